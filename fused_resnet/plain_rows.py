"""A residual block for rows of features, tables and embeddings, written with torch.nn alone."""

from __future__ import annotations

from torch import Tensor, nn


class ResidualMLP(nn.Module):
    """Two Linears with BatchNorms and a shortcut: ``act(bn2(linear2(act(bn1(linear1(x))))) + shortcut(x))``.

    He et al. 2016, figure 2, with Linears for convolutions. The shortcut is a Linear with a BatchNorm where ``features``
    differs from ``channels``, else x itself.

    Args:
        channels, features: of the input and of the output.
        hidden: features between the Linears; None for ``features``.
        activation: the ``act``; None for a ReLU.
    """

    def __init__(self, channels: int, features: int, hidden: int | None = None, activation: nn.Module | None = None) -> None:
        super().__init__()
        hidden = features if hidden is None else hidden
        self.linear1 = nn.Linear(channels, hidden, bias=False)
        self.bn1 = nn.BatchNorm1d(hidden)
        self.linear2 = nn.Linear(hidden, features, bias=False)
        self.bn2 = nn.BatchNorm1d(features)
        self.relu = nn.ReLU(inplace=True) if activation is None else activation
        self.downsample: nn.Module | None = None
        if channels != features:
            self.downsample = nn.Sequential(nn.Linear(channels, features, bias=False), nn.BatchNorm1d(features))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C] -> [N, K]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.linear1(x)))
        return self.relu(self.bn2(self.linear2(y)) + shortcut)
