#!/bin/sh
# properties = {properties}
# The last thing a job does is to leave its exit status where status.py looks for it.
rm -f logs/cluster/"$SLURM_JOB_ID".exit
({exec_job})
status=$?
echo $status > logs/cluster/"$SLURM_JOB_ID".exit
exit $status
