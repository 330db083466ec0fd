"""vLLM on the CPU, in an environment of its own (.vllm). A setting is {eager, threads, allocator}.

threads: all cores, or "auto", with which vLLM keeps some of them free for serving.
"""

from __future__ import annotations

import os
from typing import Any

from bench.data import in_steps, read_rows
from bench.link import Meter, Reply, resident, serve
from bench.works import Work


class Side:
    def prepare(self, work: dict[str, Any], rows: str, model: str, setting: dict[str, Any], scorer: str = "") -> Reply:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, whose memory and time are measured
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

        bare = resident()

        self.work, self.meter = Work(**work), Meter()
        self.steps, self.done = in_steps(read_rows(rows), self.work.rows), 0
        longest = self.work.prompt[1] + self.work.new
        self.engine = LLM(
            model=model, dtype="bfloat16", enforce_eager=setting["eager"], max_model_len=longest + 16, skip_tokenizer_init=True, seed=0
        )
        self.sampling = SamplingParams(n=self.work.responses, temperature=1.0, max_tokens=self.work.new, ignore_eos=True, detokenize=False)
        return {"bare_bytes": bare, "loaded_bytes": resident()}

    def step(self) -> Reply:
        prompts = [{"prompt_token_ids": row["prompt"]} for row in self.steps[self.done]]
        self.done += 1
        self.meter.start()
        outputs = self.engine.generate(prompts, self.sampling, use_tqdm=False)
        tokens = sum(len(answer.token_ids) for output in outputs for answer in output.outputs)
        return {**self.meter.stop(), "metrics": {"response/tokens": float(tokens)}}


if __name__ == "__main__":
    side = Side()
    serve({"prepare": side.prepare, "step": side.step})
