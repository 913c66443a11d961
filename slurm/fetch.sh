#!/bin/bash
# Download every network that a run and its evaluation need into $HF_HOME: on the login node, as
# compute nodes have no internet.
#
#     bash slurm/fetch.sh --data flickr8k --preset standard   # with the flags of the run to come
source slurm/common.sh

HF_HUB_OFFLINE=0 python - "$@" <<'END'
import os
import sys

import evaluate
import models
import train
from data import run_main


def main():
    _, config, *_ = train.settle(train.parse_flags(sys.argv[1:]))
    judge = evaluate.parse_args(["--checkpoint", "none"])
    models.TextEncoder(config)
    models.ImageCodec(config)
    evaluate.Clip(judge.clip_model, "cpu")
    evaluate.Inception(judge.inception_layer, None, "cpu")
    print(f"text encoder {config.text_encoder}, VAE {config.vae}, CLIP {judge.clip_model} and "
          f"Inception are in {os.environ['HF_HOME']}")


run_main(main)
END
