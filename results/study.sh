#!/bin/sh
# Every run of results/: sh results/study.sh, from the project's folder, goes on where it was
# stopped. It takes a day of two cores, two runs at a time, a thread each.
set -e
python=${PYTHON:-python}
study() { $python study.py --at_once=2 --threads=1 "$@"; }
seven=baseline,stacking,layer_drop,selective_backprop,rho,lion,sophia
newer=muon,schedule_free,wsd,lawa,token_rho,length_warmup,mask_schedule,token_dropping
new_adamw=muon,schedule_free,wsd,lawa,length_warmup,mask_schedule,token_dropping

# Tuning: five rates for every method, a factor of two apart, one seed.
tune() { model=$1 steps=$2; shift 2; study --models=$model --seeds=0 --budget_steps=$steps --budgets= --data=pydocs "$@"; }
rates=1e-3,2e-3,4e-3,8e-3,1.6e-2
tune bert 2500 --lrs=$rates --methods=baseline
tune bert 2500 --lrs=$rates --methods=stacking,layer_drop,selective_backprop,rho,token_rho,$new_adamw
tune bert 2500 --lrs=1.5e-4,3e-4,6e-4,1.2e-3,2.4e-3 --methods=lion
tune bert 2500 --lrs=2.5e-4,5e-4,1e-3,2e-3,4e-3 --methods=sophia
rates=5e-3,1e-2,2e-2,4e-2,8e-2
tune t5 1250 --lrs=$rates --methods=baseline
tune t5 1250 --lrs=$rates --methods=stacking,layer_drop,selective_backprop,rho,token_rho,$new_adamw
tune t5 1250 --lrs=7.5e-4,1.5e-3,3e-3,6e-3,1.2e-2 --methods=lion
tune t5 1250 --lrs=1.25e-3,2.5e-3,5e-3,1e-2,2e-2 --methods=sophia
