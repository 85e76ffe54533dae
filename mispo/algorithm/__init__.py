"""The mathematics of MIS-PO: tensors in, tensors out.

One layout everywhere: per-token tensors are flat [N] over the generated tokens of a batch, per-trajectory tensors
are [B], and `offsets` [B+1] join them: trajectory b owns the tokens offsets[b] … offsets[b+1]−1. Sums over ranks
go through a `reduce` callable, so nothing here knows how many processes there are.
"""
