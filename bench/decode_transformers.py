"""transformers' own generation: `generate` with a dynamic or static cache, or continuous batching.

A setting is {method, weights, allocator}.
"""

from __future__ import annotations

from typing import Any

from bench.data import EOS, PAD, in_steps, read_rows
from bench.link import Meter, Reply, resident, serve
from bench.works import Work


class Side:
    def prepare(self, work: dict[str, Any], rows: str, model: str, setting: dict[str, Any], scorer: str = "") -> Reply:
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        bare = resident()  # with the libraries, without a model
        self.work, self.method, self.torch, self.meter = Work(**work), setting["method"], torch, Meter()
        self.steps, self.done = in_steps(read_rows(rows), self.work.rows), 0
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, setting["weights"])).to(device).eval()
        limits: dict[str, Any] = {"max_new_tokens": self.work.new, "eos_token_id": EOS, "pad_token_id": PAD}
        if self.method == "static":
            limits["cache_implementation"] = "static"
        self.config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **limits)
        return {"bare_bytes": bare, "loaded_bytes": resident()}

    def step(self) -> Reply:
        rows = self.steps[self.done]
        self.torch.manual_seed(self.done)
        self.done += 1
        self.meter.start()
        tokens = self._continuous(rows) if self.method == "continuous" else self._generate(rows)
        return {**self.meter.stop(), "metrics": {"response/tokens": float(tokens)}}

    def _generate(self, rows: list[Any]) -> int:
        ids = self.torch.tensor([row["prompt"] for row in rows], device=self.model.device)  # all of one length
        with self.torch.no_grad():
            out = self.model.generate(
                ids, attention_mask=self.torch.ones_like(ids), generation_config=self.config, num_return_sequences=self.work.responses
            )
        return int(out[:, ids.shape[1] :].numel())

    def _continuous(self, rows: list[Any]) -> int:
        prompts = [row["prompt"] for row in rows for _ in range(self.work.responses)]
        results = self.model.generate_batch(inputs=prompts, generation_config=self.config, progress_bar=False)
        return sum(len(result.generated_tokens) for result in results.values())


if __name__ == "__main__":
    side = Side()
    serve({"prepare": side.prepare, "step": side.step})
