"""What ``--help`` says besides the flags: one sentence, the usage, and two commands that work, for each entry point."""

from __future__ import annotations

from mindspeed_lora.arguments.flag import CONVERT, EVALUATE, INFER, PREPROCESS, TRAIN

DESCRIPTIONS = {
    CONVERT: "Convert a checkpoint between Hugging Face and Megatron files, for any layout; merge an adapter; export it to PEFT.",
    PREPROCESS: "Turn instruction records into token ids and labels that posttrain_gpt.py reads from a memory map.",
    TRAIN: "Fine-tune a model on instruction data: all weights, or LoRA where --lora-target-modules is given.",
    INFER: "Ask a model, with or without an adapter, at any layout.",
    EVALUATE: "Score a model, with or without an adapter, on a benchmark, at any layout.",
}

USAGES = {
    CONVERT: "python convert_ckpt.py --load-model-type hf --save-model-type mg --load-dir PATH --save-dir PATH [flags]",
    PREPROCESS: "python preprocess_data.py --input PATH --output-prefix PATH --tokenizer-name-or-path PATH [flags]",
    TRAIN: "[torchrun --nproc_per_node N] posttrain_gpt.py --load PATH --data-path PREFIX --train-iters N [flags]",
    INFER: "[torchrun --nproc_per_node N] inference.py --load PATH [flags]",
    EVALUATE: "[torchrun --nproc_per_node N] evaluation.py --load PATH --task mmlu --task-data-path PATH [flags]",
}

EXAMPLES = {
    CONVERT: (
        "python convert_ckpt.py --load-model-type hf --save-model-type mg --target-tensor-parallel-size 1 "
        "--target-pipeline-parallel-size 2 "
        "--load-dir model_from_hf/qwen3_hf --save-dir model_weights/qwen3_mcore",
        "python convert_ckpt.py --load-model-type mg --save-model-type hf --load-dir model_weights/qwen3_mcore --lora-load ckpt/lora "
        "--save-dir model_from_hf/qwen3_hf",
    ),
    PREPROCESS: (
        "python preprocess_data.py --input dataset/alpaca.parquet --output-prefix finetune_dataset/alpaca --tokenizer-name-or-path "
        "model_from_hf/qwen3_hf "
        "--prompt-type qwen3 --workers 4",
        "python preprocess_data.py --input dataset/mine.jsonl --output-prefix finetune_dataset/mine --tokenizer-name-or-path "
        "model_from_hf/qwen3_hf "
        '--prompt-type qwen3 --map-keys \'{"prompt": "question", "query": "", "response": "answer"}\'',
    ),
    TRAIN: (
        "torchrun --nproc_per_node 2 posttrain_gpt.py --load model_weights/qwen3_mcore --data-path finetune_dataset/alpaca --save "
        "ckpt/lora "
        "--pipeline-model-parallel-size 2 --lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2 --lora-fusion --bf16 "
        "--train-iters 2000",
        "python posttrain_gpt.py --load model_from_hf/qwen3_hf --data-path finetune_dataset/alpaca --save ckpt/full --lr 1e-5 "
        "--train-iters 100",
    ),
    INFER: (
        "torchrun --nproc_per_node 2 inference.py --load model_weights/qwen3_mcore --lora-load ckpt/lora --pipeline-model-parallel-size "
        '2 --prompt "Who are you?"',
        'python inference.py --load model_from_hf/qwen3_hf --prompt-type qwen3 --task greedy --max-new-tokens 64 --prompt "Who are you?"',
    ),
    EVALUATE: (
        "torchrun --nproc_per_node 2 evaluation.py --load model_weights/qwen3_mcore --lora-load ckpt/lora --pipeline-model-parallel-size "
        "2 --task mmlu "
        "--task-data-path mmlu/test",
        "python evaluation.py --load model_from_hf/qwen3_hf --task mmlu --task-data-path mmlu --max-eval-samples 20 --output-path scores",
    ),
}

GROUP_NOTES = {
    "model": "config.json says these; a value passed here is compared with it, and an error where they differ",
    "experts and latent attention": "likewise, for the models that have them",
    "lora": "an adapter given by --lora-load knows these; a value passed here is compared with it",
}
