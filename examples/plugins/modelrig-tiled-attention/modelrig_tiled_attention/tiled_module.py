"""The kernel. Shapes: b batch, h query heads, g key/value heads, t queries, s slots, d head_dim."""

import torch


class TiledAttention:
    def __init__(self, options):
        self.block_size = options.block_size

    def prepare(self, spec, visible):
        """The symbolic mask as it is: each block of keys lowers its own part."""
        return visible

    def attend(self, q, k, v, visible, spec):
        b, h, t, d = q.shape
        g, s = spec.num_key_value_heads, k.shape[2]
        q = q.float().reshape(b, g, h // g, t, d) * spec.scale
        peak = q.new_full((b, g, h // g, t, 1), float("-inf"))  # largest score so far
        total = torch.zeros_like(peak)  # sum of exponentials relative to it
        out = q.new_zeros(b, g, h // g, t, spec.value_dim)
        for start in range(0, s, self.block_size):
            stop = min(s, start + self.block_size)
            mask = visible._replace(key_index=visible.key_index[start:stop]).dense()[:, :, None]
            scores = q @ k[:, :, None, start:stop].float().transpose(-1, -2)
            if spec.softcap is not None:
                scores = spec.softcap * torch.tanh(scores / spec.softcap)
            scores = scores.masked_fill(~mask, float("-inf"))
            new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
            shift = new_peak.masked_fill(new_peak == float("-inf"), 0.0)  # a block in which a query sees nothing
            weights, shrink = (scores - shift).exp(), (peak - shift).exp()
            total = total * shrink + weights.sum(-1, keepdim=True)
            out = out * shrink + weights @ v[:, :, None, start:stop].float()
            peak = new_peak
        y = (out / total).to(v.dtype)  # every query sees at least its own key
        return y.view(b, h, t, -1).transpose(1, 2).reshape(b, t, h * spec.value_dim)
