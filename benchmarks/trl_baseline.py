"""The benchmark's task in TRL: `GRPOTrainer`, synchronous, generation by transformers in the trainer's own process.

    python benchmarks/trl_baseline.py --model FOLDER --steps 12

Runs in a virtual environment of its own (`make .venv-trl/.installed`) and needs nothing of rl_lightning.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any

from echo_task import ANSWERS, LEARNING_RATE, NEW_TOKENS, PROMPTS, StepReporter, prompt_texts, share_of_first_letter


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    os.environ.update(
        CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS=str(args.threads)
    )
    with tempfile.TemporaryDirectory() as folder:
        train(args.model, args.steps, args.threads, folder)


def train(model: str, steps: int, threads: int, folder: str) -> None:
    """Runs `steps` steps of one optimiser update each."""
    import torch
    import transformers
    import trl
    from datasets import Dataset

    torch.set_num_threads(threads)
    reporter = StepReporter(trl=trl.__version__, transformers=transformers.__version__, torch=torch.__version__, threads=threads)
    batches: list[tuple[int, float]] = []

    def reward(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        scores = [share_of_first_letter(prompt, answer) for prompt, answer in zip(prompts, completions, strict=True)]
        batches.append((sum(map(len, completion_ids)), sum(scores) / len(scores)))
        return scores

    class Reports(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            reporter.restart()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            reporter.step(*batches.pop())

    trainer = trl.GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(model),
        processing_class=transformers.AutoTokenizer.from_pretrained(model),
        reward_funcs=reward,
        args=grpo_config(trl, steps, folder),
        train_dataset=Dataset.from_dict({"prompt": prompt_texts(steps)}),
        callbacks=[Reports()],
    )
    trainer.train()


def grpo_config(trl: Any, steps: int, folder: str) -> Any:
    """One update from all answers of a step at once, no reference model, nothing saved, nothing logged but to the terminal."""
    return trl.GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=PROMPTS * ANSWERS,
        gradient_accumulation_steps=1,
        num_generations=ANSWERS,
        num_iterations=1,
        max_completion_length=NEW_TOKENS,
        generation_kwargs={"min_new_tokens": NEW_TOKENS},
        temperature=1.0,
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        beta=0.0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main()
