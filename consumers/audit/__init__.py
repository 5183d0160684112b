"""The audit: recomputes, from the topics alone, every score and every support set, and says what differs and what is out of reach.

It shares no code with a worker's step but the model and the codec. Read `consumers.audit.partition` first.
"""

from consumers.audit.findings import Difference, Reach
from consumers.audit.run import TOLERANCE, Progress, Report, audit

__all__ = ["TOLERANCE", "Difference", "Progress", "Reach", "Report", "audit"]
