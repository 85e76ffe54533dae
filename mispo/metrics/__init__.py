"""From tensors to numbers: every metric is made here, with its meaning beside it."""
