"""What ``fused-resnet paper`` is made of: the comparisons of He et al. 2016 as data, their runs, figures and a page."""
