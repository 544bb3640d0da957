"""Every flag that MindSpeed-LLM v26.0.0 knows, without the leading dashes: what its shipped scripts pass, and what its parsers declare.

Facts about the peer's command lines, dumped from its own argparse. A name that the registry does not have for a
command is refused as "known to MindSpeed-LLM, not supported here" instead of as a misspelling.
"""

from __future__ import annotations

_SCRIPT_NAMES = """
    adam-beta1 adam-beta2 adam-eps add-dense-bias add-eos-token add-output-layer-bias add-qkv-bias add-rmsnorm-offset
    alternative-prompt append-eod attention-dropout attention-mask-type attention-softmax-in-fp32 attn-logit-softcapping beta-fast
    beta-slow bf16 broadcast calculate-per-token-loss clip-grad coc-fused-kernel context-parallel-algo context-parallel-size
    cp-attention-mask-type cp-window-size data-path dataloader-type disable-bias-linear distributed-backend
    distributed-timeout-minutes dpo-loss-type dynamic-factor enable-dsa-indexer enable-hf2mg-convert enable-mla-scale-kv-lora
    enable-mla-scale-q-lora enable-thinking eval-interval eval-iters evaluation-batch-size exit-on-missing-checkpoint
    expert-model-parallel-size expert-tensor-parallel-size fc-type ffn-hidden-size finetune first-k-dense-replace fp16
    full-attention-interval gelu-tanh gemm-gradient-accumulation-fusion global-batch-size group-query-attention handler-name
    hf-cfg-dir hf-chat-template hf-dir hidden-dropout hidden-size index-n-heads index-topk init-method-std init-norm-weight-in-fp32
    initial-loss-scale input input-embeds-norm input-layernorm-in-fp32 interleave-sliding-window is-instruction-dataset
    is-pairwise-dataset json-keys kv-channels kv-lora-rank linear-key-head-dim linear-num-key-heads linear-num-value-heads
    linear-value-head-dim load load-checkpoint-loosely load-dir load-model-type log-interval log-throughput long-factor long-mscale
    longrope-freqs-type lora-alpha lora-fusion lora-load lora-r lora-target-modules loss-chunk-size loss-compute-mode lr
    lr-decay-iters lr-decay-style lr-warmup-fraction lr-warmup-iters lu-lora-final-layer-index lu-lora-lr lu-lora-lr-ratio
    make-vocab-size-divisible-by mamba-chunk-size mamba-d-conv mamba-expand mamba-head-dim mamba-num-groups mamba-state-dim manual-gc
    manual-gc-interval map-keys master_addr master_port max-new-tokens max-position-embeddings micro-batch-size min-lr
    mla-fa-without-pad mla-mm-split model-type model-type-hf moe-alltoall-overlap-comm moe-aux-loss-coeff moe-fb-overlap
    moe-ffn-hidden-size moe-grouped-gemm moe-input-jitter-eps moe-intermediate-size moe-layer-freq moe-permutation-async-comm
    moe-permute-fusion moe-router-dtype moe-router-enable-expert-bias moe-router-group-topk moe-router-load-balancing-type
    moe-router-num-groups moe-router-pre-softmax moe-router-score-function moe-router-topk moe-router-topk-scaling-factor
    moe-shared-expert-intermediate-size moe-token-dispatcher-type moe-tp-extend-ep moe-zero-memory mtp-loss-scaling-factor
    mtp-mem-efficient-logits mtp-num-layers multi-latent-attention n-shared-experts neat-pack nnodes no-bias-dropout-fusion
    no-bias-swiglu-fusion no-chat-template no-check-for-nan-in-loss-and-grad no-enable-linear-qkv no-gradient-accumulation-fusion
    no-load-optim no-load-rng no-masked-softmax-fusion no-pad-to-seq-lengths no-rope-fusion no-save-optim no-save-rng
    no-shared-storage no-shuffle node_rank noop-layers norm-epsilon norm-topk-prob normalization nproc_per_node npu-deterministic
    num-attention-heads num-experts num-layer-list num-layers num-layers-per-virtual-pipeline-stage num-query-groups num-workers
    num-zero-experts output-logit-softcapping output-prefix overlap-grad-reduce overlap-param-gather overwrite-cache pack
    pad-to-multiple-of padded-samples padded-vocab-size params-dtype partial-rotary-factor pipeline-model-parallel-size
    position-embedding-type post-norm prompt-type q-lora-rank qk-head-dim qk-layernorm qk-pos-emb-head-dim qlora qlora-nf4
    query-pre-attn-scalar recompute-activation-function recompute-granularity recompute-method recompute-num-layers
    reset-attention-mask reset-position-ids reuse-fp32-param rmsnorm-weight-in-fp32 rope-scaling-factor rope-scaling-mscale
    rope-scaling-mscale-all-dim rope-scaling-original-max-position-embeddings rope-scaling-type rotary-base rotary-percent
    router-gating-in-fp32 save save-dir save-interval save-layer-by-layer save-lora-to-hf save-model-type schedules-method seed
    seq-aux seq-length sequence-parallel shape-order shared-expert-gate short-factor short-mscale spec split squared-relu stage
    swap-attention swap-optimizer swiglu target-expert-parallel-size target-pipeline-parallel-size target-tensor-parallel-size task
    task-data-path temperature tensor-model-parallel-size tokenizer-model tokenizer-name-or-path tokenizer-not-use-fast
    tokenizer-padding-side tokenizer-type top-p topk-softmax-in-fp32 train-iters transformer-impl ulysses-degree-in-cp
    untie-embeddings-and-output-weights use-ascend-coc use-ascend-mc2 use-cp-send-recv-overlap use-distributed-optimizer
    use-flash-attn use-fused-lightning-indexer use-fused-moe-token-permute-and-unpermute use-fused-rmsnorm use-fused-rotary-pos-emb
    use-fused-swiglu use-kv-cache use-mcore-models use-rotary-position-embeddings use-triton-gdn v-head-dim variable-seq-lengths
    vocab-size weight-decay workers
"""
_DECLARED_NAMES = """
    account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split accumulate-allreduce-grads-in-fp32 adlr-autoresume
    adlr-autoresume-interval ai-framework alibi-fusion-attn-type app-tag-run-name app-tag-run-version apply-layernorm-1p
    apply-query-key-layer-scaling apply-residual-connection-post-layernorm async-save attention-backend auto-detect-ckpt-format
    batch-size bert-embedder-type bert-load bert-no-binary-head biencoder-projection-dim biencoder-shared-query-context-model
    block-data-path cache-dir calc-ft-timeouts chain-of-thought check-for-large-grads check-for-spiky-loss
    check-weight-hash-across-dp-replicas-interval checkpoint-activations ckpt-assume-constant-structure ckpt-cfg-path
    ckpt-convert-format ckpt-convert-save ckpt-convert-update-legacy-dist-opt-format ckpt-format ckpt-fully-parallel-load
    ckpt-fully-parallel-save ckpt-step cla-share-factor classes-fraction coc-mode coc-parallel-num config-logger-dir
    context-parallel-cache-interval context-parallel-kv-cache-policy cp-comm-type cross-entropy-fusion-impl cross-entropy-loss-fusion
    cuda-graph-scope cuda-graph-warmup-steps cut-max-seqlen data-args-path data-cache-path data-obfuscation data-parallel-random-init
    data-parallel-sharding-strategy data-per-class-fraction dataset-additional-keys dataset-dir dataset-impl datasets
    ddp-average-in-collective ddp-bucket-size ddp-num-buckets ddp-pad-buckets-for-high-nccl-busbw decoder-first-pipeline-num-layers
    decoder-last-pipeline-num-layers decoder-num-layers decoder-seq-length decoupled-lr decoupled-min-lr decrease-batch-size-if-needed
    defer-embedding-wgrad-compute deterministic-mode dim-model-base dino-bottleneck-size dino-freeze-last-layer dino-head-hidden-size
    dino-local-crops-number dino-local-img-size dino-norm-last-layer dino-teacher-temp dino-warmup-teacher-temp
    dino-warmup-teacher-temp-epochs disable-bf16-reduced-precision-matmul disable-gloo-group disable-gloo-process-groups
    disable-straggler-on-startup disable-tp-comm-bulk-dgrad disable-tp-comm-bulk-wgrad disable-tp-comm-overlap-ag
    disable-tp-comm-overlap-rs disable-tp-comm-split-ag disable-tp-comm-split-rs dist-ckpt-format dist-ckpt-strictness
    distribute-saved-activations distributed-optimizer-no-replica dpo-beta dpo-label-smoothing dualpipev-dw-detach ema-decay
    embed-layernorm embedding-multiplier-scale embedding-path empty-unused-memory-level enable-backward-overlap-ag-with-matmul
    enable-cuda-graph enable-elastic-training enable-ft-package enable-hbmfault-repair enable-high-availability enable-mg2hf-convert
    enable-mla-absorb enable-overlap-ag-with-matmul enable-overlap-matmul-with-rs enable-recompute-layers-per-pp-rank
    enable-worker-reboot encoder-num-layers encoder-pipeline-model-parallel-size encoder-seq-length encoder-tensor-model-parallel-size
    end-weight-decay eod-mask-loss error-injection-rate error-injection-type eval-language evidence-data-path exit-duration-in-mins
    exit-interval exit-signal-handler exp-avg-dtype exp-avg-sq-dtype external-cuda-graph fill-neg-inf first-last-layers-bf16
    fix-router fix-sub-seq-length flash-decode fp16-lm-cross-entropy fp32-residual-connection fp8-amax-compute-algo
    fp8-amax-history-len fp8-format fp8-interval fp8-margin fp8-param-gather fp8-recipe fsdp2-config-path
    full-shuffle-instruction-dataset geglu grad-reduce-in-bf16 greedy hccl-ep-group-buffer-adaptive-factor hccl-group-buffer
    hccl-group-buffer-adaptive hccl-slice-size head-lr-mult heterogeneous-layers-config-encoded-json heterogeneous-layers-config-path
    hf-datasets-params hf-save-dir hierarchical-context-parallel-sizes high-freq-factor history-turns hybrid-attention-ratio
    hybrid-mlp-ratio hybrid-override-pattern hysteresis ict-head-size ict-load img-h img-w index-head-dim indexer-batch-size
    indexer-log-interval indexer-loss-coeff inference-batch-times-seqlen-threshold inference-dynamic-batching
    inference-dynamic-batching-buffer-guaranteed-fraction inference-dynamic-batching-buffer-overflow-factor
    inference-dynamic-batching-buffer-size-gb inference-dynamic-batching-max-requests-override
    inference-dynamic-batching-max-tokens-override inference-max-requests inference-max-seq-length inference-rng-tracker
    init-method-xavier-uniform init-model-with-meta-device input-jitter input-pp-rank input-tp-rank instruction-template
    interleave-probs is-hybrid-model iter-per-epoch iterations-to-skip jit-compile keep-fp8-transpose-cache-when-using-custom-fsdp
    keep-newlines kv-head-repeat-before-uly-alltoall lazy-mpu-init load-from-legacy load-hf-from-config loader local-rank
    log-memory-to-tensorboard log-num-zeros-in-grad log-params-norm log-progress log-straggler log-timers-to-tensorboard
    log-validation-ppl-to-tensorboard log-world-size-to-tensorboard logging-level lora-ckpt-filter lora-modules-to-save
    lora-register-forward-hook loss-scale loss-scale-window low-freq-factor lr-decay-samples lr-warmup-init lr-warmup-samples
    lr-wsd-decay-iters lr-wsd-decay-samples lr-wsd-decay-style main-grads-dtype main-params-dtype mamba-d-ssm mask-factor mask-prob
    mask-type max-eval-samples max-length max-queue-size max-samples max-tokens-to-oom megatron-cp-in-bnsd megatron-path
    memory-snapshot-path merge-file merge-group-keys mg-save-dir microbatch-group-size-per-virtual-pipeline-stage min-loss-scale
    mix-strategy mla-fa-divide-qk mla-swap-core-attn-out mla-up-proj-tp-overlap mla-zero-memory mock-data model-parallel-size
    moe-allgather-overlap-comm moe-alltoall-mc2 moe-comm-aux-loss-coeff moe-device-level-aux-loss-coeff moe-enable-deepep
    moe-expert-capacity-factor moe-extended-tp moe-layer-recompute moe-pad-expert-input-to-capacity moe-per-layer-logging
    moe-revert-type-after-topk moe-router-bias-update-rate moe-shared-expert-overlap moe-token-drop-policy moe-unperm2-mem-optim-swap
    moe-use-legacy-grouped-gemm moe-use-upcycling moe-z-loss-coeff moe-zero-memory-num-layers mrope-section mscale mscale-all-dim
    multi-head-latent-attention n-group n-subs nccl-communicator-config-path next-tockens no-align-grad-reduce no-align-param-gather
    no-async-tensor-model-parallel-allreduce no-barrier-with-level-1-timing no-bias-gelu-fusion no-checking
    no-ckpt-fully-parallel-save no-clone-scatter-output-in-embedding no-create-attention-mask-in-dataloader no-cut-token
    no-data-sharding no-fp8-wgrad no-gradient-reduce-div-fusion no-initialization no-log-loss-scale-to-tensorboard no-manual-gc-eval
    no-mmap-bin-files no-one-logger no-overlap-p2p-communication no-persist-layer-norm no-pin-cpu-grads no-pin-cpu-params
    no-position-embedding no-post-layer-norm no-scatter-gather-tensors-in-pipeline no-use-gmm-fp8
    no-use-tokenizer-model-from-checkpoint-args non-persistent-ckpt-type non-persistent-global-ckpt-dir non-persistent-local-ckpt-algo
    non-persistent-local-ckpt-dir non-persistent-save-interval num-channels num-classes num-dataset-builder-threads
    num-distributed-optimizer-instances num-layers-at-end-in-bf16 num-layers-at-start-in-bf16 num-virtual-stages-per-pipeline-rank
    o2-gradient o2-optimizer obf-seed-content one-logger-async one-logger-project one-logger-run-name only-convert-last-checkpoint
    onnx-safe openai-gelu optimization-level optimize-send-recv-comm optimizer optimizer-cpu-offload optimizer-offload-fraction
    optimizer-selection origin-postprocess original-max-position-embeddings output-bert-embeddings output-layer-slice-num
    output-multiplier-scale overlap-cpu-optimizer-d2h-h2d overlap-p2p-communication-warmup-flush
    overlap-param-gather-with-optimizer-step override-opt_param-scheduler pad-vocab-size-to padded-base-length patch-dim
    per-split-data-args-path persistent-save-interval pipeline-model-parallel-comm-backend pipeline-model-parallel-split-rank
    pipeline-num-transformer-layers pre-tockens pref-ftx pretrained-checkpoint profile profile-data-simplification profile-export-type
    profile-level profile-ranks profile-record-shapes profile-save-path profile-step-end profile-step-start profile-with-cpu
    profile-with-memory profile-with-stack prompt-type-path qk-nope-head-dim qk-rope-head-dim qlora-save-dequantize quant-grads
    quant-states query-in-block-prob rampup-batch-size recompute-activation-function-num-layers recompute-activations
    recompute-in-advance recompute-in-bubble recompute-mla-up-proj recompute-modules recompute-norm recompute-norm-num-layers
    record-memory-history ref-model refer-model-iter relative-attention-max-distance relative-attention-num-buckets replication
    replication-factor replication-jump rerun-mode result-rejected-tracker-filename retriever-report-topk-accuracies
    retriever-score-scaling retriever-seq-length retro-add-retriever retro-attention-gate retro-cyclic-train-iters
    retro-encoder-attention-dropout retro-encoder-hidden-dropout retro-encoder-layers retro-no-verify-neighbor-count
    retro-num-neighbors retro-num-retrieved-chunks retro-project-dir reward-tokens rope-scaling-beta-fast rope-scaling-beta-slow
    rotary-interleaved rotary-scaling-factor rotary-seq-len-interpolation-factor routed-scaling-factor run-workload-inspector-server
    s3-cache-path sample-rate save-to-legacy saver scale-depth scale-emb scale-fmt script-data-dir sgd-momentum share-kvstates
    shared-expert-gate-output-dimension short-seq-prob skip-bias-add skip-train sliding-window smart-swap sparse-mode split-sentences
    square-alibi-mask start-weight-decay straggler-ctrlr-port straggler-minmax-count streaming suggested-communication-unit-size
    swap-modules swap-optimizer-times swin-backbone-type te-comparison-with-bf16 te-comparison-with-cpu te-gmm-mode te-rng-tracker
    tensorboard-dir tensorboard-log-interval tensorboard-queue-size test-data-path test-mode tiktoken-num-special-tokens
    tiktoken-pattern tiktoken-special-tokens timing-log-level timing-log-option titles-data-path top-k topk-group tp-2d
    tp-comm-bootstrap-backend tp-comm-overlap tp-comm-overlap-cfg tp-comm-overlap-rs-dgrad tp-x tp-y train-data-path train-samples
    train-sync-interval true-vocab-size use-checkpoint-args use-checkpoint-opt_param-scheduler use-cpu-initialization use-custom-fsdp
    use-deter-comp use-dist-ckpt use-fused-lightning-indexer-loss use-fused-ring-attention-update use-fusion-attn-v2 use-glm-rope
    use-global-aux-loss use-legacy-models use-mc2 use-mp-args-from-checkpoint-args use-one-sent-docs use-persistent-ckpt-worker
    use-precision-aware-optimizer use-pytorch-profiler use-ring-exchange-p2p use-rope-scaling use-sparse-flash-attn use-torch-fsdp2
    use-torch-optimizer-for-cpu-offload use-tp-pp-dp-mapping use-ulysses-allgather-kv use-wandb valid-data-path virtual-optimizer
    vision-backbone-type vision-pretraining vision-pretraining-type vocab-extra-ids vocab-file w-pack wandb-exp-name wandb-project
    wandb-save-dir warmup weight-decay-incr-style wgrad-deferral-limit yaml-cfg
"""

SCRIPT_NAMES: tuple[str, ...] = tuple(_SCRIPT_NAMES.split())
"""The 278 flags that the peer's example scripts for our five commands (and convert_ckpt_v2.py) pass; torchrun's own five among them."""

DECLARED_NAMES: tuple[str, ...] = tuple(_DECLARED_NAMES.split())
"""The 509 further flags that the peer's parsers declare, or that its pretraining scripts pass."""

PEER_NAMES = frozenset(f"--{name}" for name in (*SCRIPT_NAMES, *DECLARED_NAMES))
"""All of them, with dashes."""
