"""Transactions of version 2 (KIP-890), where a cluster has them: three requests each for the five of version 1.

A broker adds a partition to the transaction when the first records for it come, and the group when its offsets do; nothing asks for that
before. Every transaction's end gives the producer a new epoch, so that no record that comes late can open a transaction anew. The client
knows these requests and never makes them (kafka-python 3.0.12), so its producer is taught to here; all else, retries and failures
included, stays the client's.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

from kafka.producer.transaction_manager import (
    EndTxnHandler,
    ProducerIdAndEpoch,
    TransactionalRequestResult,
    TransactionManager,
    TxnOffsetCommitHandler,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    import kafka
    from kafka.structs import ConsumerGroupMetadata, OffsetAndMetadata

FEATURE, LEVEL = "transaction.version", 2
"""What a cluster says that has them: from Apache Kafka 4.0 on, unless it was upgraded and the feature was not."""

PRODUCE, OFFSETS, END = 12, 5, 5
"""The first versions of the requests that mean it."""


def offered(features: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a cluster has transactions of version 2, by the features that it tells of."""
    _, highest = features.get(FEATURE, {}).get("finalized", (0, 0))
    return bool(highest >= LEVEL)


def teach(producer: kafka.KafkaProducer) -> None:
    """Have a transactional producer, not in a transaction, make those to come as version 2."""
    manager, sender = producer._transaction_manager, producer._sender  # noqa: SLF001 - nothing public says how
    made = sender._produce_request  # noqa: SLF001
    manager.maybe_add_partition_to_transaction = types.MethodType(_add, manager)
    manager.send_offsets_to_transaction = types.MethodType(_send_offsets, manager)
    manager._begin_completing_transaction = types.MethodType(_begin_to_end, manager)  # noqa: SLF001
    sender._produce_request = lambda *given: _of_version(made(*given), PRODUCE)  # noqa: SLF001


def _of_version(request: Any, version: int) -> Any:  # noqa: ANN401  the client's requests have no types
    """The request, of this version and no other: of a lower one it would mean something else."""
    request._min_version = request._max_version = version  # noqa: SLF001
    return request


def _add(manager: TransactionManager, tp: kafka.TopicPartition) -> None:
    """The partition counts as added before its records are sent, which add it."""
    with manager._lock:  # noqa: SLF001
        manager._fail_if_not_ready_for_send()  # noqa: SLF001
        manager._partitions_in_transaction.add(tp)  # noqa: SLF001
        manager._transaction_started = True  # noqa: SLF001


def _send_offsets(
    manager: TransactionManager, offsets: Mapping[kafka.TopicPartition, OffsetAndMetadata], group: ConsumerGroupMetadata
) -> TransactionalRequestResult:
    with manager._lock:  # noqa: SLF001
        manager._fail_if_not_ready_for_send()  # noqa: SLF001
        pending = manager._pending_txn_offset_commits  # noqa: SLF001
        pending.update(offsets)
        handler = _Offsets(manager, group, pending, TransactionalRequestResult())
        manager._enqueue_request(handler)  # noqa: SLF001
        manager._transaction_started = True  # noqa: SLF001
        return handler.result


def _begin_to_end(manager: TransactionManager, committed: bool) -> TransactionalRequestResult:  # noqa: FBT001  the client's
    handler = _End(manager, committed)
    manager._enqueue_request(handler)  # noqa: SLF001
    return handler.result


class _Offsets(TxnOffsetCommitHandler):  # type: ignore[misc]  # without types
    def _build_request(self) -> Any:  # noqa: ANN401
        return _of_version(super()._build_request(), OFFSETS)


class _End(EndTxnHandler):  # type: ignore[misc]
    def __init__(self, manager: TransactionManager, committed: bool) -> None:  # noqa: FBT001
        super().__init__(manager, committed)
        _of_version(self.request, END)

    def handle_response(self, response: Any) -> None:  # noqa: ANN401
        """Called with the manager's lock held. Numbers of records begin anew with each epoch."""
        if response.error_code == 0:
            manager = self.transaction_manager
            manager.producer_id_and_epoch = ProducerIdAndEpoch(response.producer_id, response.producer_epoch)
            manager._sequence_numbers.clear()  # noqa: SLF001
            manager._last_acked_offset.clear()  # noqa: SLF001
        super().handle_response(response)
