"""The end of a tile of dw: its store, and the gradients of a filter's other parameters, which follow from it. See wgrad.py."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .finish import Column, arrive, store_row, sum_rows
from .gradients import inverse_deviation, vector
from .numerics import rounded


class Given(NamedTuple):
    """Pointers to what the gradients of a filter's other parameters are made of, ``None`` where the launch has none."""

    eps: Any
    w: Any
    sum: Any
    bias: Any
    gamma: Any
    mean: Any
    var: Any


class Results(NamedTuple):
    """Pointers to what is written, ``None`` for what nobody wants: dw like w, the others fp32 [K]."""

    dw: Any
    dbias: Any
    dgamma: Any
    dbeta: Any


@triton.jit
def write_vectors(inner, filters, exists, results, given, SCALED: tl.constexpr, BATCH: tl.constexpr):
    """Gradients of the per-filter parameters. ``inner``: ``<w_k, G_k>``, fp32 [1, K], or None without dgamma."""
    row = filters[None, :]
    mask = exists[None, :]
    if BATCH:
        if results.dbias is not None:  # BatchNorm subtracts what a bias adds
            tl.store(results.dbias + row, tl.zeros(row.shape, dtype=tl.float32), mask=mask)
    elif given.sum is not None:
        total = vector(given.sum, filters, exists)
        if results.dbeta is not None:
            tl.store(results.dbeta + row, total, mask=mask)
        if SCALED:
            invstd = inverse_deviation(given.var, given.eps, filters, exists)
            if results.dbias is not None:
                factor = invstd
                if given.gamma is not None:
                    factor = factor * vector(given.gamma, filters, exists)
                tl.store(results.dbias + row, factor * total, mask=mask)
            if inner is not None:
                offset = -vector(given.mean, filters, exists)
                if given.bias is not None:
                    offset += vector(given.bias, filters, exists)
                tl.store(results.dgamma + row, invstd * (inner + offset * total), mask=mask)
        elif results.dbias is not None:
            tl.store(results.dbias + row, total, mask=mask)


@triton.jit
def write_tile(total, offsets, mask, filters, exists, results, given, SCALED: tl.constexpr):
    """Store a piece of dw. Returns its part of ``<w_k, G_k>``, fp32 [K]; without dgamma nothing of use."""
    if results.dw is not None:
        dw = total
        if SCALED:
            factor = inverse_deviation(given.var, given.eps, filters, exists)
            if given.gamma is not None:
                factor = factor * vector(given.gamma, filters, exists)
            dw = total * factor.trans()
        tl.store(results.dw + offsets, rounded(dw, results.dw.dtype.element_ty), mask=mask)
    if results.dgamma is not None:
        w = tl.load(given.w + offsets, mask=mask, other=0.0).to(tl.float32)
        return tl.sum(tl.where(mask, w * total, 0.0), axis=1)
    else:
        return 0.0


@triton.jit
def write_rest(
    inner,
    filters,
    exists,
    column,
    columns,
    row,
    tiles,
    K,
    counters_of,
    memory,
    results,
    given,
    SCALED: tl.constexpr,
    BATCH: tl.constexpr,
):
    """What follows from a tile of dw, ``inner``: its :func:`write_tile`'s. ``column``, ``row``: index of the tile."""
    if results.dgamma is not None:
        parts = Column(memory.products, memory.counters, column, columns, columns, filters, exists, K)
        store_row(parts, 0, column, inner)
        if arrive(memory.counters + tiles * counters_of + row, columns):
            inner = sum_rows(parts, 0, 0, columns, 1)
            write_vectors(inner[None, :], filters, exists, results, given, SCALED, BATCH)
    elif column == 0:
        write_vectors(None, filters, exists, results, given, SCALED, BATCH)


@triton.jit
def vectors_only(depths, results, given, FILTERS: tl.constexpr, SCALED: tl.constexpr, BATCH: tl.constexpr):
    """Gradients of a layer's per-filter parameters where nobody wants those of its filters (they are frozen)."""
    filters = tl.program_id(0) * FILTERS + tl.arange(0, FILTERS)
    write_vectors(None, filters, filters < depths.K, results, given, SCALED, BATCH)
