"""The nano DeepSeek-V4: experts, model loading, tokenizer, data set and checkpoint."""

import unittest

import torch
from sglang.test.ci.ci_register import register_cpu_ci
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts

from pdkit.nano.experts import NAME, dense_experts_forward

register_cpu_ci(est_time=40, suite="stage-a-test-cpu")


def _experts(num_experts=4, hidden=32, inner=24, seed=0):
    config = DeepseekV4Config(
        hidden_size=hidden,
        moe_intermediate_size=inner,
        n_routed_experts=num_experts,
        num_experts_per_tok=2,
        num_hidden_layers=1,
    )
    config._experts_implementation = "eager"
    module = DeepseekV4Experts(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=3.0, generator=generator)
    return module.requires_grad_(False)


class TestDenseExperts(unittest.TestCase):
    def _check(self, rows, index):
        module = _experts()
        generator = torch.Generator().manual_seed(rows)
        hidden = torch.randn(rows, 32, generator=generator)
        weights = torch.rand(rows, 2, generator=generator)
        expected = module(hidden, index, weights)
        torch.testing.assert_close(
            dense_experts_forward(module, hidden, index, weights),
            expected,
            rtol=1e-5,
            atol=1e-5 * expected.abs().max().item(),
        )
        self.assertGreater(expected.abs().max().item(), 0)

    def test_equals_eager(self):
        generator = torch.Generator().manual_seed(7)
        for rows in (1, 2, 3, 7, 128):
            index = torch.rand(rows, 4, generator=generator).topk(2).indices
            with self.subTest(rows=rows):
                self._check(rows, index)

    def test_expert_named_twice_counts_twice(self):
        self._check(5, torch.zeros(5, 2, dtype=torch.long))

    def test_activations_are_clamped(self):
        module = _experts()
        hidden = 100 * torch.ones(1, 32)
        module.limit = 1e-3
        out = dense_experts_forward(module, hidden, torch.tensor([[0, 1]]), torch.ones(1, 2))
        bound = 2 * 24 * 1e-6 * module.down_proj.abs().max().item()
        self.assertLess(out.abs().max().item(), bound)

    def test_selected_by_name(self):
        module = _experts()
        module.config._experts_implementation = NAME
        hidden, index, weights = torch.randn(3, 32), torch.tensor([[0, 1]] * 3), torch.rand(3, 2)
        self.assertTrue(
            torch.equal(module(hidden, index, weights), dense_experts_forward(module, hidden, index, weights))
        )


if __name__ == "__main__":
    unittest.main()
