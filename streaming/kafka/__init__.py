"""Apache Kafka behind the interface of `streaming.log`."""

from streaming.kafka.broker import KafkaLog
from streaming.kafka.client import KafkaOptions, Security

__all__ = ["KafkaLog", "KafkaOptions", "Security"]
