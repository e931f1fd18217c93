"""Stage `kernels`: rates of single kernels beside the ceilings of the card."""
