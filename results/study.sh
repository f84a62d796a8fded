#!/bin/sh
# Every run of results/. From the project's folder, `sh results/study.sh` goes on where it was
# stopped. It takes a day of two cores, two runs at a time, a thread each.
set -e
trap 'exit 130' INT TERM  # what runs beside is stopped at exit
python=${PYTHON:-python}
study() { $python study.py --at_once=2 --threads=1 "$@"; }
adamw=stacking,layer_drop,selective_backprop,rho,token_rho,muon,wsd,lawa,length_warmup,mask_schedule
adamw=$adamw,token_dropping,schedule_free

# Tuning: five rates of every method, each twice the one before, one seed; T5's best and half of it
# again, for more updates, and two of BERT's. The best ones are the defaults of size tiny:
# python report.py runs/*steps* --csv=results/tuning.csv
# A run that diverges fails (status 2), and the others go on.
updates=2500
tune() {
    study --data=pydocs --seeds=0 --budgets= --models=$1 --budget_steps=$updates --methods=$2 \
        --lrs=$3 || [ $? -eq 2 ]
}
rates=1e-3,2e-3,4e-3,8e-3,1.6e-2
tune bert baseline $rates
tune bert $adamw $rates
tune bert lion 1.5e-4,3e-4,6e-4,1.2e-3,2.4e-3
tune bert sophia 2.5e-4,5e-4,1e-3,2e-3,4e-3
rates=5e-3,1e-2,2e-2,4e-2,8e-2
tune t5 baseline $rates
tune t5 $adamw $rates
tune t5 lion 7.5e-4,1.5e-3,3e-3,6e-3,1.2e-2
tune t5 sophia 1.25e-3,2.5e-3,5e-3,1e-2,2e-2
tune t5 schedule_free 0.16  # one more: its best rate was the highest tried
updates=5000
tune t5 baseline 2e-2,4e-2
tune t5 stacking,layer_drop,selective_backprop,rho,token_rho,muon,lawa,token_dropping 2e-2,4e-2
tune t5 wsd,length_warmup,mask_schedule 1e-2,2e-2
tune t5 schedule_free 4e-2,8e-2
tune t5 lion 1.5e-3,3e-3
tune t5 sophia 2.5e-3,5e-3
updates=10000
tune bert baseline,stacking 2e-3,4e-3

# In hours of one thread of the machine that the reference file names, which was made by
# python rst.py --threads=1 --repeats=100 --save=results/one-thread.json, the other core busy.
seven=baseline,stacking,layer_drop,selective_backprop,rho,lion,sophia
newer=muon,schedule_free,wsd,lawa,token_rho,length_warmup,mask_schedule,token_dropping
hours() {
    study --reference=results/one-thread.json --data=$1 --models=$2 --seeds=$3 --budgets=$4 --methods=$5 $6
}
# All seeds of a budget run one after another, to share a machine even if it changes later.
hours pydocs bert 0,1,2 0.1 $seven,$newer
hours pydocs bert 0,1,2 0.1 wsd,lawa+wsd --cool_down=0  # averaging in place of decay
hours pydocs bert 0,1,2 0.1 stacking+length_warmup,stacking+mask_schedule  # of the three best
hours pydocs bert 0,1,2 0.033 $seven
hours pydocs bert 0,1,2 0.058,0.17 baseline,stacking,layer_drop  # between, of those that lead first
hours pydocs t5 0,1,2 0.1 $seven,$newer
hours pydocs t5 0,1,2 0.1 baseline --lrs=4e-2  # the best of the shorter trials
hours english bert 0,1,2 0.1 $seven
hours pydocs bert 0,1,2 0.3 $seven
hours pydocs t5 0,1,2 0.3 $seven
hours pydocs bert 0,1,2 0.011 baseline  # more budgets, to read speed-ups off
hours pydocs t5 0,1,2 0.033,0.058,0.17,0.5 baseline

# Downstream: the baseline, the best and the worst of the others at 0.3 h, and untrained, on SST-2,
# from the folder $GLUE or downloaded. The recipe was chosen before a score was seen.
sst2() {
    $python finetune.py runs/bert-tiny-$1-pydocs-0.3h-one-thread-seed2-* --suite=glue --task=sst2 \
        --epochs=1 --lr=3e-4 --seeds=0,1,2,3,4 --threads=1 ${GLUE:+--data_dir="$GLUE"} $2
}
for method in baseline stacking selective_backprop; do sst2 $method; done
sst2 baseline --untrained

# RST at work: one plan and one seed beside no, one and three processes that multiply matrices.
busy='import torch; torch.set_num_threads(1); a = torch.rand(512, 512)
while True: a @ a'
for others in 0 1 3; do
    run=runs-under-load/$others-others
    [ -f $run/result.json ] && continue
    started=
    stop() { [ -z "$started" ] || kill $started; started=; }
    trap stop EXIT
    for each in $(seq $others); do $python -c "$busy" & started="$started $!"; done
    $python train.py --model=bert --size=tiny --data=pydocs --device=cpu --threads=1 --out=$run \
        --reference=results/one-thread.json --budget_hours=0.033
    stop
done
