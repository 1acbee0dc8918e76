"""The comparisons at each scale, as data: which networks, trained how, how often."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """One network trained once.

    Attributes:
        network: a name for :func:`fused_resnet.models.build`.
        seed: of weights, order and augmentation.
    """

    network: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.network}-seed{self.seed}"


@dataclass(frozen=True)
class Scale:
    """A set of comparisons.

    Attributes:
        name, about: for people.
        data, recipe: of :mod:`fused_resnet.train`.
        deep_recipe: for the networks of :attr:`deep`, which need a warm-up.
        epochs: length of a run; None for the recipe's own.
        pool: images are averaged over squares of this many pixels before the network sees them.
        seeds: how often each network is trained.
        plain, residual: the same depths without and with shortcuts, shallow first: figures 1, 4 and 6 and the table by depth.
        compared: index of the two depths whose curves are drawn.
        options: one depth with the shortcuts A, B, C (table 3).
        highway: gated networks (table 6's comparison), of depths that are among ``residual``.
        deep: networks that use ``deep_recipe``.
        responses: whose layer responses are drawn (figure 7).
    """

    name: str
    about: str
    data: str
    recipe: str
    epochs: float | None
    pool: int
    seeds: int
    plain: tuple[str, ...]
    residual: tuple[str, ...]
    compared: tuple[int, int]
    options: tuple[str, ...]
    highway: tuple[str, ...]
    responses: tuple[str, ...]
    deep: tuple[str, ...] = ()
    deep_recipe: str = ""

    @property
    def networks(self) -> tuple[str, ...]:
        """Each once, those of the main comparison first."""
        main = [names[index] for index in self.compared for names in (self.plain, self.residual)]
        return tuple(dict.fromkeys([*main, *self.highway, *self.options, *self.plain, *self.residual]))

    def runs(self, seeds: int | None = None) -> list[Run]:
        """All runs; every network once before any gets its second seed, so that an interrupted set is a smaller one."""
        return [Run(network, seed) for seed in range(seeds or self.seeds) for network in self.networks]


def _cifar(kind: str, depths: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(f"cifar_{kind}{depth}" for depth in depths)


SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            "tiny",
            "scikit-learn's handwritten digits as images of 16x16, 8 epochs: minutes on two CPU cores",
            "digits",
            "digits-paper",
            8,
            2,
            3,
            _cifar("plain", (20, 56)),
            _cifar("resnet", (20, 56)),
            (0, 1),
            ("cifar_resnet20", "cifar_resnet20_b", "cifar_resnet20_c"),
            ("cifar_highway56",),
            ("cifar_plain20", "cifar_resnet20", "cifar_plain56", "cifar_resnet56"),
        ),
        Scale(
            "cifar",
            "CIFAR-10 after the paper's recipe, 64000 steps of 128 images: days on one GPU",
            "cifar10",
            "cifar-paper",
            None,
            1,
            3,
            _cifar("plain", (20, 32, 44, 56)),
            _cifar("resnet", (20, 32, 44, 56, 110)),
            (0, 3),
            ("cifar_resnet56", "cifar_resnet56_b", "cifar_resnet56_c"),
            ("cifar_highway20", "cifar_highway56"),
            ("cifar_plain20", "cifar_resnet20", "cifar_plain56", "cifar_resnet56", "cifar_resnet110"),
            ("cifar_resnet110",),
            "cifar-paper-deep",
        ),
        Scale(
            "imagenet",
            "ImageNet as a folder, after the paper's recipe: weeks on one GPU",
            "folder",
            "imagenet-paper",
            None,
            1,
            1,
            ("plain18", "plain34"),
            ("resnet18_a", "resnet34_a", "resnet50_1x1", "resnet101_1x1", "resnet152_1x1"),
            (0, 1),
            ("resnet34_a", "resnet34_b", "resnet34_c"),
            ("highway34",),
            ("plain18", "resnet18_a", "plain34", "resnet34_a"),
        ),
    )
}
