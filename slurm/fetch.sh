#!/bin/bash
# Download every network that a run and its evaluation need into $HF_HOME: on the login node, as compute nodes have no internet.
#
#     bash slurm/fetch.sh --data flickr8k --preset standard          with the flags of the train.py run to come
set -euo pipefail
source slurm/common.sh

HF_HUB_OFFLINE=0 python - "$@" <<'END'
import os
import sys

import evaluate
import train
from data import run_main
from models import ImageCodec, Model, TextEncoder, load_unet_weights


def main():
    (args, config, *_), judge = train.parse_args(sys.argv[1:]), evaluate.parse_args(["--checkpoint", "none"])
    TextEncoder(config)
    ImageCodec(config)
    if args.init_unet:
        load_unet_weights(Model(config).unet, args.init_unet)
    evaluate.Clip(judge.clip_model, "cpu")
    evaluate.Inception(judge.inception_layer, None, "cpu")
    print(f"text encoder {config.text_encoder}, VAE {config.vae}, CLIP {judge.clip_model} and Inception are in {os.environ['HF_HOME']}")


run_main(main)
END
