#!/bin/sh
# The runs of docs/course.md, but for those of methods that its reader writes, on the whole of an
# otherwise idle machine. From the project's folder, `sh results/course.sh` goes on where it was
# stopped; runs beside loads start over.
set -e
trap 'exit 130' INT TERM  # what runs beside is stopped at exit
python=${PYTHON:-python}
run() {
    out=runs/course/$1
    shift
    [ -f $out/result.json ] || $python train.py --device=cpu --out=$out "$@"
}
run 1-baseline
run 1-constant --method=wsd --warm_up=0.2 --cool_down=0 --lr=4e-3

# Step 2: alone, and beside a load for each core from 30 to 90 seconds after the start.
[ -f mine.json ] || $python rst.py --device=cpu --threads=1 --save=mine.json
beside_loads() {
    [ ! -f runs/course/$1/result.json ] || return 0
    rm -rf runs/course/$1 runs/loads
    loads=
    for load in $(seq $(nproc)); do
        (
            sleep 30
            exec timeout 60 $python train.py --device=cpu --budget_steps=9999 --out=runs/loads/$load
        ) &
        loads="$loads $!"
    done
    trap 'kill $loads' EXIT
    run "$@"
    trap - EXIT
    for load in $loads; do
        wait $load || [ $? -eq 124 ]  # it ran until its time was over
    done
}
run 2-alone --threads=1 --reference=mine.json
beside_loads 2-beside-loads --threads=1 --reference=mine.json
beside_loads 2-plain-time --threads=1

run 3-stacking --method=stacking
run 3-stacking-copy --method=stacking --optimizer_state=copy
run 4-layer-drop --method=layer_drop
run 4-layer-drop-rescale --method=layer_drop --rescale
run 5-rho --method=rho
run 6-lion --method=lion
run 6-muon --method=muon
run 6-signum --method=lion --beta2=0.9
run 7-length-warmup --method=length_warmup
run 7-stacking-length-warmup --method=stacking+length_warmup
$python study.py --device=cpu --methods=baseline,stacking --seeds=0,1,2 --budgets=0.02,0.04
$python study.py --device=cpu --methods=baseline --lrs=2e-3,8e-3 --seeds=0,1,2 --budgets=0.02
