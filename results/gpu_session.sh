#!/usr/bin/env bash
# Run one part of results/TODO.md on a GPU machine, keep every row, never stop at a failure.
#
#   bash results/gpu_session.sh PART [PART ...]      parts: see below; output: $OUT (default ./out)
#
# Wheels in .whl/ (see results/TODO.md), if any, are installed beside the machine's own packages.
set -uo pipefail
cd "$(dirname "$0")/.."
for part in "$@"; do
  grep -q "^    $part)" results/gpu_session.sh || { echo "unknown part: $part" >&2; exit 2; }
done
OUT=${OUT:-out}
# Few files come back, and none from a folder of many when a call is cut off: so outside of $OUT
MORE=$(mktemp -d)      # traces and curves
PICTURES=$(mktemp -d)  # a series puts them beside its rows
mkdir -p "$OUT"
ln -sfn "$PICTURES" "$OUT/pictures"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if compgen -G ".whl/*.whl" >/dev/null; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target /tmp/site .whl/*.whl || exit 1
  export PYTHONPATH=/tmp/site
fi
nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.sm,clocks.max.sm --format=csv,noheader |
  tee "$OUT/gpu.txt"

# pack: what has been made so far, as two files; after each step, since the next may be cut off
pack() {
  tar -czf "$OUT/more.tar.gz" -C "$MORE" .
  [ -z "$(ls "$PICTURES")" ] || tar -czhf "$OUT/pictures.tar.gz" -C "$OUT" pictures
}

SPARE=0  # seconds that the rows so far have left of their limits: the next may need them to compile

# row SECONDS NAME FLAGS...: one benchmark in a process of its own; its JSON line goes to rows.jsonl
row() {
  local limit=$(($1 + SPARE)) name=$2 start=$SECONDS
  shift 2
  echo "=== $name: run_benchmark.py $*"
  if timeout -k 5 "$limit" python3 run_benchmark.py $FAST --results "$OUT/rows.jsonl" "$@" \
    >"$MORE/last.txt" 2>&1; then
    grep -E "^(load|total|memory|quality|  [a-z_]+ +[0-9])" "$MORE/last.txt"
  else
    echo "FAILED ($?)"
    tail -n 15 "$MORE/last.txt"
  fi
  cat "$MORE/last.txt" >>"$OUT/log.txt"
  pack
  SPARE=$((limit > SECONDS - start ? limit - SECONDS + start : 0))
  echo "--- $((SECONDS - start)) s"
}

# series SECONDS FLAGS...: a ladder or leave-one-out; rows that are done stay when the time is up
series() {
  local limit=$1 start=$SECONDS
  shift
  echo "=== run_benchmark.py $*"
  timeout -k 5 "$limit" python3 run_benchmark.py --results "$OUT/rows.jsonl" "$@" 2>&1 |
    tee -a "$OUT/log.txt" | cut -c1-200
  pack
  echo "--- $((SECONDS - start)) s"
}

# startup SECONDS NAME: one kind of start, cold and warm; rows go to startup.jsonl
startup() {
  timeout -k 5 "$1" python3 -m utils.startup $SCHNELL --random_weights --starts "$2" \
    --results "$OUT/startup.jsonl" 2>&1 | tee -a "$OUT/log.txt"
}

# correct SECONDS TESTS...: interrupted when the time is up, so that what failed is still told
correct() {
  local limit=$1
  shift
  timeout -s INT -k 20 "$limit" python3 -m pytest -m gpu -v --tb=short --durations=10 -n 4 \
    --dist worksteal -p no:cacheprovider "$@" 2>&1 | tee -a "$OUT/pytest.txt" | grep -vE " (PASSED|SKIPPED)" | tail -n 60
}

# kernels SECONDS CASES FLAGS...: one by one; a process a call, so that a lost device loses no more
kernels() {
  local limit=$1 cases=$2
  shift 2
  timeout -k 5 "$limit" python3 -m utils.kernel_bench --limit_s "$((limit - 25))" --cases "$cases" \
    --results "$OUT/kernels.jsonl" "$@" 2>&1 | tee -a "$OUT/log.txt" | grep -v "^| " | cut -c1-200
}

# scales SECONDS FLAGS...: calibrate static activation scales, into $MORE/scales.json
scales() {
  local limit=$1
  shift
  timeout -k 5 "$limit" python3 -m utils.calibrate_scales "$@" --scales_file "$MORE/scales.json" \
    2>&1 | tee -a "$OUT/log.txt" | tail -n 2
}

# products FLAGS...: the float8 products' variants by turns, the second turn from the compile cache
products() {
  local limit flags
  for limit in 130 65; do
    for flags in "" --fused_mlp --triton_float8; do
      row $limit "fp8-blocks $flags" "$@" $BLOCKS $flags
    done
  done
}

# Full size, random weights: speed, memory, the latents' error against eager; pictures by part tiny
FAST="--random_weights --quality_source none --quality_prompts 2"
EAGER="--disable_fused_projections --disable_fa3 --disable_channels_last --disable_quant --disable_device_images --compile_export_mode disabled"
BLOCKS="--compile_export_mode compile --compile_scope blocks"
FULL="--compile_export_mode compile --compile_scope full"
AOTI="--compile_export_mode export_aoti --cache-dir /tmp/packages"
SCHNELL="--ckpt black-forest-labs/FLUX.1-schnell"
DEV="--ckpt black-forest-labs/FLUX.1-dev"
KONTEXT="--ckpt black-forest-labs/FLUX.1-Kontext-dev --image tiny_flux/samples.webp"
CACHE="--cache_dit_config cache_config.yaml"
TURNS="180 105"  # seconds of two rows that take turns: in the second turn both are compiled

for part in "$@"; do
  case $part in
    correct) # every GPU path against its plain twin
      correct 550 tests ;;
    correct-kernels) # ours and the packages', without the stack around them
      correct 230 tests/test_{attention_gpu,fused_kernels_gpu,float8_product_gpu,quant,cudagraph}.py \
        tests/test_{denoise,deferred_scales,text_quant,device_images,subpixel_upsampling}.py ;;
    correct-stack) # every mode against eager; compiles for most of its time
      correct 400 tests/test_{stack_gpu,decoder_gpu,export_bf16,image_encoder}.py \
        tests/test_{extras_controlnet,memory_gpu}.py ;;
    kernels) # each at FLUX.1's shapes, checked: what torch and the packages bring, and ours
      kernels 220 'product/*' --skip_compiled
      kernels 130 'attention/*,between/*,static/*,decoder/*,text/*,transfer/*' --skip_compiled ;;
    kernels-compiled) # the same places by the compiler, the cheapest first
      kernels 200 'between/*/inductor,decoder/group-norm*/inductor*'
      kernels 200 'static/*,product/*inductor*'
      kernels 180 'text/*/inductor*,decoder/whole/inductor*' ;;
    tiny) # what the steps do to pictures: the trained checkpoints, on this GPU
      series 350 --ladder --ckpt tiny-schnell --compile_scope blocks --num_runs 20
      series 220 --ladder --ckpt tiny-dev --compile_scope blocks --rows eager,fa3,quant,compile ;;
    schnell) # the ladder, cheapest compile first
      series 560 --ladder $SCHNELL $FAST --compile_scope blocks --measure_ceilings \
        --rows eager,fused_projections,fa3,channels_last,quant,compile,inductor_tuning_flags ;;
    schnell-trace) # what stands between the default and its floor; the first row tunes kernels
      row 500 fp8-blocks $SCHNELL $BLOCKS --kernel_table --trace-file "$MORE/schnell.json.gz"
      row 70 lossless-blocks $SCHNELL --disable_quant $BLOCKS ;;
    schnell-full) # what whole-graph compilation adds, and what it costs
      row 300 fp8-full $SCHNELL $FULL
      row 280 lossless-full $SCHNELL --disable_quant $FULL ;;
    schnell-aoti) # first export, then the start from the stored package
      row 420 fp8-aoti $SCHNELL $AOTI
      row 120 fp8-aoti-warm $SCHNELL $AOTI --use-cached-model ;;
    dev) # the default, what most of the steps that wait bring together, and both ends in bf16
      row 100 eager $DEV $EAGER --num_runs 3
      row 270 fp8-blocks $DEV $BLOCKS --num_runs 5 --kernel_table
      row 110 fp8-blocks-kernels $DEV $BLOCKS --num_runs 5 --kernel_table \
        --fused_kernels --fa3_rotation --modulation_once
      row 90 lossless-blocks $DEV --disable_quant $BLOCKS --num_runs 5 ;;
    dev-cache) # compiled blocks without graphs, reused steps; the pattern stands in the row
      row 180 bf16-cache $DEV --disable_quant $CACHE --num_runs 5
      row 180 fp8-cache $DEV $CACHE --num_runs 5 --trace-file "$MORE/dev-cache.json.gz" ;;
    dev-mask) # the presets' own steps, graphs kept: what they leave of the time without a mask
      row 145 "fp8-blocks" $DEV $BLOCKS --num_runs 5
      for preset in slow medium fast; do
        row 145 "fp8-$preset" $DEV $BLOCKS --num_runs 5 --step_mask $preset
      done ;;
    dev-mask-bf16)
      for preset in slow medium fast; do
        row 180 "bf16-$preset" $DEV --disable_quant $BLOCKS --num_runs 5 --step_mask $preset
      done ;;
    curve) # computed steps against PSNR on the trained checkpoints, this GPU's own kernels
      for ckpt in tiny-dev "tiny-kontext --image tiny_flux/source.png"; do
        echo "=== utils.cache_sweep --ckpt $ckpt"
        timeout -k 5 280 python3 -m utils.cache_sweep --ckpt $ckpt $BLOCKS \
          --results "$MORE/curve-${ckpt%% *}.jsonl" 2>&1 | tee -a "$OUT/log.txt" | cut -c1-200
      done ;;
    kontext)
      row 180 eager $KONTEXT $EAGER --num_runs 3 --num_warmup 1
      row 180 lossless-blocks $KONTEXT --disable_quant $BLOCKS --num_runs 3 --num_warmup 1
      row 180 fp8-blocks $KONTEXT $BLOCKS --num_runs 3 --num_warmup 1 ;;
    image-encoder) # the encoder of Kontext's image compiled and graphed too: that stage's time
      for limit in $TURNS; do
        row $limit fp8-blocks $KONTEXT $BLOCKS --num_runs 3 --num_warmup 1
        row $limit fp8-blocks-image-encoder $KONTEXT $BLOCKS --num_runs 3 --num_warmup 1 \
          --compile_image_encoder
      done ;;
    peers) # diffusers' own recipes on the same call, taking turns with ours
      series 570 --peers $SCHNELL $FAST $BLOCKS --rounds 2 --num_runs 5 \
        --rows ours,peer:diffusers-eager,peer:diffusers-compile,peer:diffusers-fa3 ;;
    peers-dev)
      series 570 --peers $DEV $FAST $BLOCKS --rounds 2 --num_runs 3 \
        --rows ours,peer:diffusers-compile,peer:diffusers-fa3 ;;
    flux-fast) # the project itself, from .peers; whole-graph autotuning, so one at a time
      series 570 --peers $DEV $FAST $BLOCKS --rounds 2 --num_runs 3 \
        --rows ours,peer:flux-fast ;;
    flux-fast-aoti) # its own default, which it exports for Schnell's call
      row 560 "peer:flux-fast" $SCHNELL --peer flux-fast --compile_export_mode export_aoti ;;
    leave-one-out) # each step's own worth inside the fastest quick stack
      series 570 --leave_one_out $SCHNELL $FAST $BLOCKS \
        --rows "everything,without fused_projections,without fa3,without quant" ;;
    leave-one-out-rest) # the base again, since each call is compared with its own
      series 570 --leave_one_out $SCHNELL $FAST $BLOCKS --rows \
        "everything,without channels_last,without device_images,without inductor_tuning_flags,without compile" ;;
    variants) # settings of a step against each other
      for flag in --persistent_tma "--fa3_dtype bf16" "--quant_granularity tensor" "--quant_filter all"; do
        row 140 "$flag" $SCHNELL $BLOCKS $flag
      done ;;
    rotation) # float8 attention behind the Hadamard rotation: time on Dev, quality on tiny-dev
      for limit in 145 90; do
        row $limit fp8-blocks $DEV $BLOCKS --num_runs 5
        row $limit fp8-blocks-rotation $DEV $BLOCKS --num_runs 5 --fa3_rotation --kernel_table
      done
      for flag in "" --fa3_rotation; do
        FAST="" row 55 "tiny-dev $flag" --ckpt tiny-dev --compile_export_mode disabled --num_runs 5 $flag
      done ;;
    fusion) # what is stored between the products: limits raised, scales behind, kernels of our own
      for flags in "" --fusion_limits "--fusion_limits --deferred_scales" --fused_kernels; do
        row 145 "fp8-blocks $flags" $DEV $BLOCKS --num_runs 5 --kernel_table $flags
      done ;;
    attention) # kernels by name against the machine's own, taking turns: part of `correct` first
      for limit in 120 70; do
        for backend in auto ${BACKENDS:-fa4 int8}; do
          row $limit "attention $backend" $DEV $BLOCKS --num_runs 5 --fa3_dtype bf16 \
            --attention_backend $backend
        done
      done ;;
    blackwell) # linear layers by blocks: speed at full size, pictures on the trained checkpoints
      for dtype in float8 mxfp8 nvfp4; do
        row 120 "linear $dtype" $DEV $BLOCKS --num_runs 5 --kernel_table --quant_dtype $dtype
        FAST="" row 70 "tiny linear $dtype" --ckpt tiny-dev $BLOCKS --quant_dtype $dtype
      done ;;
    modulation) # all steps' modulation before the loop: with and without, taking turns
      for limit in $TURNS; do
        row $limit fp8-blocks $DEV $BLOCKS --num_runs 5
        row $limit fp8-blocks-modulation $DEV $BLOCKS --num_runs 5 --modulation_once \
          --trace-file "$MORE/dev-modulation.json.gz"
      done ;;
    host) # one graph of all steps, and pictures rounded on the host: by turns
      for limit in 125 65; do
        row $limit fp8-blocks-modulation $SCHNELL $BLOCKS --modulation_once
        row $limit fp8-blocks-loop-graph $SCHNELL $BLOCKS --modulation_once --loop_graph
        row $limit fp8-blocks-host-images $SCHNELL $BLOCKS --modulation_once \
          --disable_device_images
      done ;;
    fused-kernels) # our kernels between the products, beside the same stack without
      row 140 fp8-blocks $SCHNELL $BLOCKS
      row 140 fp8-blocks-fused-kernels $SCHNELL $BLOCKS --fused_kernels
      row 150 fp8-blocks $DEV $BLOCKS --num_runs 5
      row 150 fp8-blocks-fused-kernels $DEV $BLOCKS --num_runs 5 --fused_kernels \
        --trace-file "$MORE/dev-fused-kernels.json.gz" ;;
    float8-products) # the single blocks' joint product, and our own float8 kernel
      products $SCHNELL ;;
    float8-products-dev)
      products $DEV --num_runs 5 ;;
    static-scales) # GELU and its cast inside of the product: by turns; then pictures of tiny-dev
      scales 80 $DEV --random_weights --prompt one --num_inference_steps 1
      for limit in 140 75; do
        for flags in "" "--static_scales $MORE/scales.json"; do
          row $limit "fp8-blocks-kernels ${flags:+static}" $DEV $BLOCKS --num_runs 5 \
            --fused_kernels --triton_float8 --kernel_table $flags
        done
      done
      scales 30 --ckpt tiny-dev
      FAST="" row 45 "tiny-dev static" --ckpt tiny-dev --compile_export_mode disabled --num_runs 5 \
        --fused_kernels --triton_float8 --static_scales "$MORE/scales.json" ;;
    startup-blocks) # a process from its start to its tenth image: packages of two blocks
      startup 350 "export_aoti blocks" ;;
    startup-compile) # the same with what torch.compile has made in the store
      startup 350 "compile blocks" ;;
    startup-full) # the same with packages of the whole transformer
      startup 560 "export_aoti full" ;;
    text) # T5 and CLIP compiled and graphed: the stage's time
      for limit in $TURNS; do
        row $limit fp8-blocks $SCHNELL $BLOCKS
        row $limit fp8-blocks-text-encoders $SCHNELL $BLOCKS --compile_text_encoders
      done ;;
    text-lossy) # T5 in float8, compiled as in `text`; then no padding
      row 145 fp8-blocks-text-encoders $SCHNELL $BLOCKS --compile_text_encoders
      row 145 fp8-blocks-text-quant $SCHNELL $BLOCKS --compile_text_encoders --quant_text_encoder
      row 145 fp8-blocks $DEV $BLOCKS --num_runs 5
      row 145 fp8-blocks-text-padding $DEV $BLOCKS --num_runs 5 --drop_text_padding ;;
    decoder) # each of the decoder's steps alone: the decoding stage's time, and its kernels
      for flag in "" --channel_group_norm --vae_attention --conv_benchmark; do
        row 145 "fp8-blocks $flag" $SCHNELL $BLOCKS $flag --kernel_table
      done ;;
    decoder-upsampling) # upsampling inside the convolutions, by both ways, beside the stack without
      for flag in "" "--subpixel_upsampling transposed" "--subpixel_upsampling phases" ""; do
        row 145 "fp8-blocks $flag" $SCHNELL $BLOCKS $flag --kernel_table
      done ;;
    decoder-together) # all four, taking turns with none
      for limit in $TURNS; do
        row $limit fp8-blocks $SCHNELL $BLOCKS --kernel_table
        row $limit fp8-blocks-decoder $SCHNELL $BLOCKS --channel_group_norm --kernel_table \
          --subpixel_upsampling transposed --vae_attention --conv_benchmark
      done ;;
    memory) # peaks at full size beside the estimates, which stand in each row's steps
      for tier in full group; do
        row 280 "memory $tier" $DEV --memory $tier --compile_export_mode disabled --num_runs 3
      done ;;
    gguf) # what a compressed transformer costs and saves: the trained checkpoint's, on this GPU
      for type in Q8_0 Q4_0; do
        python3 -m extras.write_gguf --ckpt tiny-dev --type $type --output-file "tiny-$type.gguf"
        for mode in compressed dequantize; do
          FAST="" row 140 "gguf $type $mode" --ckpt tiny-dev --gguf_file "tiny-$type.gguf" \
            --gguf_mode $mode --compile_export_mode compile --compile_scope blocks
        done
      done ;;
    guidance) # a second forward a step, and Heun's second evaluation: about twice the loop's time
      row 130 fp8-blocks $DEV $BLOCKS --num_runs 3
      row 165 fp8-blocks-true-cfg $DEV $BLOCKS --num_runs 3 --true_cfg_scale 2 --negative_prompt blurry
      row 165 fp8-blocks-heun $DEV $BLOCKS --num_runs 3 --scheduler heun
      row 110 fp8-blocks-unipc $DEV $BLOCKS --num_runs 3 --scheduler unipc ;;
    lora) # fused into float8 with graphs, then swapped in place beside the weights
      lora=tiny_flux/loras/tiny-schnell-night.safetensors
      series 140 --ladder --ckpt tiny-schnell --lora $lora --compile_scope blocks --rows eager,quant,compile
      timeout -k 5 140 python3 gen_image.py --ckpt tiny-schnell --lora $lora --lora $lora:0.5 \
        --swap_loras $BLOCKS --output-file "$MORE/swapped.png" 2>&1 | tee -a "$OUT/log.txt" | tail -n 8 ;;
    serving) # the served models' components against FluxPipeline, without a server
      for model in clip_encoder t5_encoder dit_transformer vae_decoder bls_orchestrator; do
        echo "=== $model"
        timeout -k 5 110 python3 "triton_models/$model/1/model.py" --ckpt tiny-dev \
          --disable_quant --compile_export_mode disabled 2>&1 | tee -a "$OUT/log.txt" | grep -E "^(ok|WRONG|error)"
      done ;;
    sizes)
      row 150 768x1344 $SCHNELL $BLOCKS --height 768 --width 1344
      row 150 batch-4 $SCHNELL $BLOCKS --num_images_per_prompt 4 --num_runs 5 ;;
  esac
  pack
done
rm "$OUT/pictures"
