"""A verifier of the promises (a) to (e), which reads the topics alone and shares nothing with the worker but the records' layout.

`verify` returns what is wrong, one finding each; an empty list is a run that kept its promises. It needs everything since the first
offset: topics that retention has cut are a finding of their own.
"""

from tests.verify.check import Rules, verify
from tests.verify.finding import Finding

__all__ = ["Finding", "Rules", "verify"]
