# What the tools call a TPU slice that flexjax.plan calls v5e:16x16.
# shellcheck shell=bash disable=SC2034,SC2154  # the script that sources this has `topology`, and reads the others

read_topology() { # sets chips hosts chips_per_host shape accelerator_type runtime_version tpu_type node_label
  local generation=${topology%%:*} factor cores=1 form='^[0-9]+x[0-9]+$'
  shape=${topology#*:} chips=1
  case $generation in
    v5e) accelerator_type=v5litepod runtime_version=v2-alpha-tpuv5-lite node_label=tpu-v5-lite-podslice ;;
    v5p)
      accelerator_type=v5p runtime_version=v2-alpha-tpuv5 node_label=tpu-v5p-slice
      cores=2 form='^[0-9]+x[0-9]+x[0-9]+$'
      ;;
    v6e) accelerator_type=v6e runtime_version=v2-alpha-tpuv6e node_label=tpu-v6e-slice ;;
    *) die "--topology=$topology is no TPU slice; use v5e:16x16, v5p:4x4x8 or v6e:16x16, in the size you want" ;;
  esac
  [[ $shape =~ $form ]] || die "--topology=$topology has the wrong shape; write v5e and v6e like 16x16, v5p like 4x4x8"
  for factor in ${shape//x/ }; do chips=$((chips * 10#$factor)); done
  ((chips > 0 && (chips < 4 || chips % 4 == 0))) || die "--topology=$topology has $chips chips; hosts hold 4 each"
  chips_per_host=$((chips < 4 ? chips : 4))
  hosts=$((chips / chips_per_host))
  tpu_type=$accelerator_type-$shape
  accelerator_type=$accelerator_type-$((chips * cores)) # v5p counts TensorCores, two a chip
}
