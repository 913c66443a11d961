"""Small CLIP and VAE folders with random weights, to run the real scripts without a download.

    python tests/tiny_networks.py FOLDER [captions.csv]      # writes FOLDER/clip and FOLDER/vae
"""
import csv
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

SOME_CAPTIONS = ["a dog runs over the grass", "two people on a beach", "a red car",
                 "the cat sleeps", "a photo of a"]


def make_clip(folder, captions=SOME_CAPTIONS, width=32, vocab_size=2000, layers=2, heads=4,
              mlp_ratio=2):
    """A CLIP text model with random weights and a byte-level BPE tokenizer for the captions."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    start, end = specials = ["<|startoftext|>", "<|endoftext|>"]
    tokenizer.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, 0), (end, 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=start, eos_token=end,
                            pad_token=end, model_max_length=77).save_pretrained(folder)
    torch.manual_seed(0)
    CLIPTextModel(CLIPTextConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=width,
        intermediate_size=mlp_ratio * width, num_hidden_layers=layers, num_attention_heads=heads,
        max_position_embeddings=77, bos_token_id=0, eos_token_id=1,
        pad_token_id=1)).save_pretrained(folder)
    return str(folder)


def make_vae(folder, scaling_factor=0.7, shift_factor=None, blocks=(16, 32), latent_channels=4,
             layers=1, groups=8):
    """An AutoencoderKL with random weights that halves the side len(blocks) - 1 times. Stable
    Diffusion's: blocks (128, 256, 512, 512), 2 layers, 32 groups."""
    torch.manual_seed(1)
    AutoencoderKL(
        block_out_channels=blocks, down_block_types=["DownEncoderBlock2D"] * len(blocks),
        up_block_types=["UpDecoderBlock2D"] * len(blocks), norm_num_groups=groups,
        latent_channels=latent_channels, layers_per_block=layers, scaling_factor=scaling_factor,
        shift_factor=shift_factor, sample_size=32).save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    captions = SOME_CAPTIONS
    if len(sys.argv) > 2:
        with open(sys.argv[2], encoding="utf-8") as file:
            captions = [row[1] for row in csv.reader(file)][1:]
    make_clip(Path(sys.argv[1]) / "clip", captions, width=64)
    make_vae(Path(sys.argv[1]) / "vae")
