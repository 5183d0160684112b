"""Gradient steps task by task: what the loops of `model.stepkernels` are given, and what is made of what they find.

They serve where derivatives by hand are enough and every layer between an item's first and its last is d_e by d_e: see `serves`. Shapes
as in `model.steps`.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import stepkernels
from model.fastweights import Pair, Pulled
from model.mamo import Mamo, Prediction
from model.numbering import embed
from model.products import turn
from model.rowkernels import CODES
from model.stepkernels import BLOCK, Fast, Found, Given, Layers, Plan, Room, Rows
from model.tasks import Batch

if TYPE_CHECKING:
    from model.kernels import Floats

SHARES = 4
"""Slices of the tasks for each thread: a thread whose core is taken by somebody else meanwhile keeps nobody waiting for long."""


LINE = 64
"""Bytes of a line of the processor's caches, and of its widest registers."""


class Own(NamedTuple):
    """What gradients go back through: what tasks were adapted from, and what was found."""

    model: Mamo
    layers: Layers
    given: Given
    found: Found


def serves(model: Mamo) -> bool:
    """Whether the loops do this model's steps.

    All layers take them, nothing goes back through them by autograd, and what joins e_u and e_i is d_e by d_e: M_uI, or the first of
    several rating layers.
    """
    settings = model.settings
    steps = settings.local == "all" and settings.inner_steps > 0 and settings.order == "first"
    return steps and (settings.task_memory or settings.rating_layers > 1)


@np.errstate(all="ignore")
def solve(model: Mamo, batch: Batch, *, learning: bool) -> tuple[Prediction, Own]:
    """Adapt every task to its support and score its query, as `Mamo.forward` does."""
    settings, memory, phi = model.settings, model.memory, model.arrays()
    (p_u, _), (p_i, _) = embed(model.users.embedding(batch.user_places)), embed(model.items.embedding(batch.item_places))
    attention, item_of = memory.attend(p_u, settings.temperature, centred=settings.centred), batch.item_of.numpy()
    attended = torch.from_numpy(attention)
    of_user = p_u @ phi["user.0.weight"] + phi["user.0.bias"]
    if settings.feature_memory:
        width = phi["user.0.weight"].size
        of_user -= settings.tau * (attention @ memory.gradient.numpy()[:, width : width + settings.embedding_size])
    layers = start(model, phi)
    given = Given(
        attention=attention,
        p_u=p_u,
        of_user=of_user,
        p_i=p_i,
        of_item=p_i @ phi["item.0.weight"] + phi["item.0.bias"],
        items=item_of[batch.support.items.numpy()],
        ratings=batch.support.ratings.numpy(),
        starts=batch.support.bounds.numpy(),
        user_of=batch.user_of.numpy(),
        query_items=item_of[batch.query_items.numpy()],
        queries=batch.queries.numpy(),
        steps=settings.inner_steps,
        rate=settings.inner_rate,
        clip=settings.inner_clip,
        learning=learning,
    )
    (count, most), d, kept = batch.query_items.shape, settings.embedding_size, len(batch.user_of) if learning else 0
    found = Found(
        score=np.zeros((count, most), p_u.dtype),
        into=np.zeros((kept, len(layers.shared.weights) + 1, most, d), p_u.dtype),
        at=np.zeros((kept, len(layers.shared.weights) + 2, most, d), p_u.dtype),
        at_p_i=np.zeros((kept, most, p_i.shape[1]), p_u.dtype),
        user_learned=np.zeros((kept, d), p_u.dtype),
        mixing=np.empty((kept, 2, d, d), p_u.dtype),
    )
    share_out(layers, given, found)
    mixing = adapted = None
    if learning and settings.task_memory:
        mixing = (attended @ memory.mixing.flatten(1)).view(-1, *memory.mixing.shape[1:])
        adapted = torch.from_numpy(found.mixing).flatten(1, 2).mT
    prediction = Prediction(torch.from_numpy(found.score), None, attended, torch.from_numpy(p_u), [], adapted, mixing, None, None)
    return prediction, Own(model, layers, given, found)


def start(model: Mamo, phi: dict[str, Floats]) -> Layers:
    """The networks before adaptation: what all tasks share, and what the memories' rows add to it (Eq. 7, 9)."""
    settings, memory = model.settings, model.memory
    d, depth, dtype = settings.embedding_size, settings.layers, model.vector.numpy().dtype
    above = range(1, depth)
    rating = [f"rating.{layer}" for layer in range(settings.rating_layers)]
    last = rating.pop()
    joint, joint_bias = np.zeros((2 * d, d), dtype), np.zeros(d, dtype)
    if not settings.task_memory:
        first = rating.pop(0)
        joint, joint_bias = phi[f"{first}.weight"], phi[f"{first}.bias"]
    user, rest = [f"user.{layer}" for layer in above], [*(f"item.{layer}" for layer in above), *rating]
    weights = [*(phi[f"{name}.weight"] for name in user), joint[:d], joint[d:], *(phi[f"{name}.weight"] for name in rest)]
    nothing = np.zeros(d, dtype)
    biases = [*(phi[f"{name}.bias"] for name in user), nothing, joint_bias, *(phi[f"{name}.bias"] for name in rest)]
    biased, follows = np.ones(len(weights), np.bool_), np.zeros(len(weights), np.int64)
    biased[depth - 1] = False
    biased[depth] = not settings.task_memory
    code = CODES[settings.activation]
    # Neither e_u, nor e_i, nor what M_uI makes of them goes through an activation.
    follows[: max(0, depth - 2)] = follows[depth + 1 : 2 * depth - 1] = follows[2 * depth :] = code
    follows[depth] = 0 if settings.task_memory else code

    gradient, rows, size = memory.gradient.numpy(), len(memory.profile) if settings.memory != "off" else 0, (depth + 1) * d * d
    blended = np.zeros((rows, size + (depth + 1) * d), dtype)
    if settings.feature_memory:
        end = phi["user.0.weight"].size + d
        for place in range(depth - 1):
            begin, end = end, end + d * d + d
            blended[:, place * d * d : (place + 1) * d * d] = -settings.tau * gradient[:, begin : end - d]
            blended[:, size + place * d : size + (place + 1) * d] = -settings.tau * gradient[:, end - d : end]
    if settings.task_memory:
        for row, mixing in zip(blended, memory.mixing.contiguous().numpy(), strict=True):
            turn(mixing, row[size - 2 * d * d : size].reshape(2 * d, d))
    item = np.array([*range(depth + 1, 2 * depth), depth, *range(2 * depth, len(weights))])
    return Layers(
        plan=Plan(biased, follows, user=np.arange(depth), item=item, joint=depth - 1, first=code if depth > 1 else 0),
        shared=Fast(np.stack(weights), np.stack(biases), np.append(phi[f"{last}.weight"], phi[f"{last}.bias"])),
        blended=blended,
        first_blended=gradient if settings.feature_memory else gradient[:0],
        tau=settings.tau,
    )


@cache
def pool(threads: int) -> ThreadPoolExecutor:
    """So many threads, which stay."""
    return ThreadPoolExecutor(threads, thread_name_prefix="steps", initializer=lambda: HELPING.append(threading.get_native_id()))


HELPING: list[int] = []
"""The threads of all pools, as Linux numbers them."""


def send_elsewhere() -> None:
    """Have helping threads wake on any core but this one.

    In a virtual machine Linux takes an idle core for one that the host has taken back, and wakes a thread on the core of who calls it.
    There both take turns until, some milliseconds later, the other core is seen to be free: longer than there is work.
    """
    if sys.platform == "linux" and (others := os.sched_getaffinity(0) - {_libc().sched_getcpu()}):
        for thread in HELPING:
            with suppress(OSError):  # Where that is not allowed they wake as they would.
                os.sched_setaffinity(thread, others)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def share_out(layers: Layers, given: Given, found: Found) -> None:
    """Have the loops run by as many threads as torch uses, this one among them. A task's numbers do not depend on who adapts it."""
    threads, count = torch.get_num_threads(), len(given.user_of)
    blocks = -(-count // BLOCK)
    slices = min(blocks, SHARES * threads) if threads > 1 else 1
    # One iterator for all of them: whoever is done takes the next slice.
    cuts = iter(list(pairwise(min(count, BLOCK * (blocks * cut // slices)) for cut in range(slices + 1))))
    longest = max(BLOCK, given.query_items.shape[1], int(np.diff(given.starts).max()))

    def run() -> None:
        room = room_for(layers, given, longest)
        for cut in cuts:
            stepkernels.adapt(layers, given, found, room, *cut)

    if slices > 1:
        send_elsewhere()
    others = [pool(threads - 1).submit(run) for _ in range(min(threads, slices) - 1)]
    try:
        run()
    finally:
        for _ in cuts:  # Where this thread has failed, nobody is to take what is left.
            pass
        for other in others:
            if not other.cancel():  # One that never began has nothing left to do.
                other.result()


def room_for(layers: Layers, given: Given, n: int) -> Room:
    """Room for tasks with ``n`` interactions in support or query at the most."""
    (count, d, _), d_i, q, dtype = layers.shared.weights.shape, given.p_i.shape[1], given.query_items.shape[1], given.p_i.dtype
    support = max(1, int(np.diff(given.starts).max()))
    users, items = len(layers.plan.user) + 1, len(layers.plan.item) + 1

    def empty(*shape: int) -> Floats:
        # Begun here, no register of rows of 64 bytes or a multiple lies in two lines of the cache: numpy begins at each 16 bytes.
        whole = np.empty(math.prod(shape) + LINE // dtype.itemsize, dtype)
        begin = -whole.ctypes.data % LINE // dtype.itemsize
        return whole[begin : begin + math.prod(shape)].reshape(shape)

    return Room(
        own=empty(BLOCK, layers.blended.shape[1]),
        attended=empty(BLOCK, given.attention.shape[1]),
        scaled=empty(BLOCK, given.p_u.shape[1]),
        begun_user=empty(BLOCK, d),
        fast=Fast(empty(count, d, d), empty(count, d), empty(d + 1)),
        p_i=empty(n, d_i),
        begun=empty(n, d),
        learned=empty(n, d),
        support=Rows(empty(items, n, d), empty(items, n, d)),
        slopes=empty(n),
        ones=np.ones((1, n), dtype),
        user_learned=empty(d),
        user=Rows(empty(users, 1, d), empty(users, 1, d)),
        asked_p_i=empty(q, d_i),
        query=Rows(empty(items, q, d), empty(items, q, d)),
        alike=empty(2, support * max(support, q)),
        joined=empty(1, d),
        product=empty(d, d),
        turned=empty(2, d * n),
    )


def pull(own: Own, at_score: Tensor) -> Pulled:
    """From the gradient at the scores (B, q) back through the queries, at the adapted parameters."""
    model, layers, given = own.model, own.layers, own.given
    phi, memory, depth, count = model.phi, model.memory, model.settings.layers, len(layers.shared.weights)
    into, at = torch.from_numpy(own.found.into), torch.from_numpy(own.found.at) * at_score[:, None, :, None]
    p_u, p_i = (torch.from_numpy(values[of]) for values, of in ((given.p_u, given.user_of), (given.p_i, given.query_items)))

    def of_user(place: int) -> Tensor:
        return at[:, place].sum(1, keepdim=True)

    def pairs(places: range) -> list[Pair]:
        return [(into[:, place], at[:, place]) for place in places]

    user = [(p_u[:, None], of_user(count)), *((into[:, place, :1], of_user(place)) for place in range(depth - 1))]
    at_user, at_item = user[0][1], at[:, count + 1]
    at_p_u = at_user @ phi["user.0.weight"].T - (at_user @ torch.from_numpy(own.found.user_learned)[..., None]) * p_u[:, None]
    if model.settings.feature_memory:
        rows = memory.gradient[:, : phi["user.0.weight"].numel()].view(-1, *phi["user.0.weight"].shape)
        attention = torch.from_numpy(given.attention[given.user_of])
        at_p_u -= layers.tau * torch.einsum("bk,kio,bo->bi", attention, rows, at_user[:, 0])[:, None]
    at_p_i = at_item @ phi["item.0.weight"].T - torch.from_numpy(own.found.at_p_i) * at_score[..., None]
    return Pulled(
        rating=[*pairs(range(2 * depth, count)), (into[:, count], at_score[..., None])],
        joint=[(into[:, depth - 1, :1], of_user(depth - 1)), *pairs(range(depth, depth + 1))],
        user=user,
        item=[(p_i, at_item), *pairs(range(depth + 1, 2 * depth))],
        at_p_u=at_p_u,
        at_p_i=at_p_i,
    )
