"""The bundled world: a synthetic population whose preferences are known exactly.

    python -m training.world --output_dir world --seed 1

writes ordinary data files, which are read by the same loaders as a user's own data:

    texts.jsonl              {"prompt", "response"}: the writers' answers, which SFT learns from
    comparisons.jsonl        {"prompt", "chosen", "rejected"}: pairs of distinct answers, judged by
                             the population
    texts_eval.jsonl         the same as texts.jsonl, for held-out phrasings of the questions
    comparisons_eval.jsonl   the same as comparisons.jsonl, for held-out phrasings, with
                             "bayes_probability", the probability of the recorded choice
    response_sets.jsonl      for each held-out prompt its finite response set, with the shares of
                             the population and of the writers
                             (every line also has "group", the topic; every file of held-out prompts
                             is divided by prompt into validation and test when it is read)
    answer_key.jsonl         for each prompt its answers by the opinion that they express
    base/                    a sentencepiece tokenizer and a tiny Llama with random weights

The population's utilities r* are the logarithms of its shares, so its Plackett-Luce shares are
softmax(r*), and it prefers answer i to j with probability sigmoid(r*_i - r*_j). The writers' shares
are far from the population's: KL-regularized RLHF ends at softmax(log writers + r*), preference
matching at softmax(r*).
"""

import argparse

import numpy as np

from training.world.files import WorldSizes, write_world
from training.world.population import kl_bias
from training.world.topics import TOPICS


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: --output_dir DIR, --seed N and one option per size."""
    parser = argparse.ArgumentParser(prog="python -m training.world", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seed", type=int, default=42)
    for name, default in vars(WorldSizes()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = vars(parser.parse_args(arguments))
    output_dir, seed = options.pop("output_dir"), options.pop("seed")
    try:
        sizes = WorldSizes(**options)
    except ValueError as error:
        parser.error(str(error))
    write_world(output_dir, seed, sizes)
    if sizes.groups > 1:
        print(f"{len(TOPICS)} topics, on which two groups disagree, written to {output_dir}")
        return
    bias = np.mean([kl_bias(topic) for topic in TOPICS])
    print(f"{len(TOPICS)} topics written to {output_dir}; KL's bias (mean TV): {bias:.3f}")


if __name__ == "__main__":
    main()
