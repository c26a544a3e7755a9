#!/bin/bash
# Train on one or many nodes under Slurm, with requeueing: sbatch configs/launch/slurm.sh -c configs/ddpm_cifar10.yaml -e runs/cifar10
#
# Five minutes before the time limit Slurm sends SIGUSR1 to every process; at a preemption SIGTERM, or SIGUSR1 where the
# cluster has PreemptParameters=send_user_signal. The training saves, all processes end with status 138 or 143, and the job
# puts itself back into the queue; the same command goes on from the checkpoint (-r auto), also when a node fails. A process
# that dies takes the others along after two minutes. One task per GPU, without a launcher between Slurm and the training.
#SBATCH --job-name=ddpm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))  # below the ports that systems hand out

srun --kill-on-bad-exit=0 --wait=120 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c '
  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
  export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
  exec "${PYTHON:-python}" train_ddpm.py "$@" -r auto' train_ddpm "$@"
status=$?

if [ $status -eq 138 ] || [ $status -eq 143 ]; then  # 128 + SIGUSR1 or SIGTERM: saved, not finished
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit $status
