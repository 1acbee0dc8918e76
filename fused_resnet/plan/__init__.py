"""Chain -> launches, as data: what runs, in which order, what is kept for the backward.

Forward of a layer with given statistics, and of one with the batch's (design: docs/fusion.md, docs/training.md)::

    a_l = act(affine_l(conv_l(a_(l-1))))                     one launch, epilogue affine
    y_l = conv_l(act(bn_(l-1)(y_(l-1))))                     one launch, prologue bn_relu, epilogue stats: a_l is never written
    out = act(affine_L(conv_L(a_(L-1))) + shortcut)          the shortcut is added in conv_L's epilogue,
    out = act(bn_L(y_L) + shortcut)                          or, where statistics must be known first, by bn_add_relu
    out = T * act(bn_L(y_L)) + (1 - T) * shortcut            with a gate, T = sigmoid(conv_gate(x)): by gate

A BatchNorm in front of the first convolution, the chain's entry, is a layer 0 whose y_0 is x::

    y_1 = conv_1(act(bn_0(x)))                               the prologue, with given statistics or the batch's;
                                                             the batch's are made by a launch that reads x: statistics

A backward that wants z_l, in front of an activation behind given statistics (:meth:`.Chain.pre_activation`)::

    z_l = affine_l(conv_l(act(z_(l-1))))                     kept in the place of a_l: the next launch applies act on load
    out = act(z_L)                                           by bn_add_relu, z_L with the shortcut in it

Backward, given ``dout`` (``dz_l`` is the gradient behind the activation's mask, ``dy_l`` that behind the BatchNorm)::

    dz_L, sums   = bn_add_relu_backward(dout, out, y_L)
    dw_l         = wgrad(dy_l, a_(l-1))                      dy_l from dz_l, a_(l-1) from y_(l-1), both on load
    dz_(l-1)     = dgrad(dy_l, w_l) * act'                   and its sums, in the epilogue
    dx           = dgrad(dy_1, w_1) + shortcut's gradient

or, behind an entry, whose dz_0 and sums the dgrad of conv_1 makes as any other::

    dx           = output_gradient(dz_0, x) + shortcut's gradient

With a gate the first is ``dz_L, dt, dside, sums = gate_backward(dout, y_L, t, shortcut)``, and the gradient of the gate's
convolution is added to the shortcut's by its dgrad.

What is kept for the backward is not written down anywhere: it is what the backward's launches read and do not make.
"""

from __future__ import annotations

from .backward import backward_plan
from .forward import droppable, forward_plan, rebuild_plan
from .keep import kept_slots, nominal_size, remembered_slots, saved_slots, trainable_slots
from .launches import Plan

__all__ = [
    "Plan",
    "backward_plan",
    "droppable",
    "forward_plan",
    "kept_slots",
    "nominal_size",
    "rebuild_plan",
    "remembered_slots",
    "saved_slots",
    "trainable_slots",
]
