# shellcheck shell=bash
# What the three sbatch templates have in common: run a worker in its image, watch over it, submit its successor.
#
# Needs bash, Slurm's commands and Apptainer on the batch host, nothing else. The worker asks through two pipes for what
# only the host can do, as edif_hpc/core/errands.py describes; it ends by itself when its successor has taken over.
# A template sets these and then reads this file:
#
#   EDIF_HOME     the service's home, on the shared file system        POOL        the worker's pool
#   IMAGE         the image                                            APPTAINER   options for the accelerator (array)
#   CACHE         the Hugging Face hub cache; empty: hub/ in the home  VISIBLE     its visibility variables (array)
#   CONFIG        the settings file; empty: the home's own             BINDS       further binds (array)
#   HANDOVER      overlap, or requeue where one allocation has room    PROXIES     NAME=VALUE for the worker (array)
#   LEAST_UPTIME  seconds before which no successor is submitted       STOP_FILE   no successor while it exists
#   MOST_GENERATIONS  after how many allocations a chain ends

set -u -o pipefail
started=$(date +%s)

say() { printf '%s %s\n' "$(date -u +%FT%TZ)" "$*"; }
give_up() { say "$*" >&2; exit 1; }

[ -n "${SLURM_JOB_ID:-}" ] || give_up "This is for sbatch: submit it."
[ -d "$EDIF_HOME" ] || give_up "There is no home $EDIF_HOME on this node; it must be on a shared file system."
[ -f "$IMAGE" ] || give_up "There is no image $IMAGE; build it with: edif-hpc image build"
command -v apptainer > /dev/null || give_up "There is no apptainer on this node; load its module in the template."

# -- which generation of which lineage this is: it stands in the allocation's name ------------------------------------

prefix="edif-$(printf %s "$EDIF_HOME" | sha256sum | cut -c1-6)-$POOL"
if [[ "$SLURM_JOB_NAME" =~ ^"$prefix"-([0-9a-f]{6})-g([0-9]+)$ ]]; then
    lineage=${BASH_REMATCH[1]} generation=${BASH_REMATCH[2]}
else
    lineage=$(printf '%s %s' "$SLURM_JOB_ID" "$started" | sha256sum | cut -c1-6) generation=1
    scontrol update "JobId=$SLURM_JOB_ID" "JobName=$prefix-$lineage-g1" || give_up "The allocation could not be named."
fi
next=$((generation + 1))
successor="$prefix-$lineage-g$next"

deadline=${SLURM_JOB_END_TIME:-}
if [ -z "$deadline" ]; then
    ends=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e) || give_up "Slurm does not tell when this ends."
    deadline=$(date -d "$ends" +%s) || give_up "Slurm printed '$ends' for the end of this allocation."
fi

# -- what the worker may ask for --------------------------------------------------------------------------------------

slurm() {  # a command without what this allocation's environment would tell it
    local name clean=()
    for name in $(compgen -e | grep -E '^(SLURM|SBATCH|SQUEUE|SCANCEL)_' | grep -vx SLURM_CONF); do clean+=(-u "$name"); done
    timeout 120 env "${clean[@]}" "$@"
}

found_in_queue() {  # prints "id state" of the successor, if Slurm has it; fails when Slurm does not say
    local listed
    listed=$(slurm squeue --noheader --user="$(id -un)" --format='%A %T %j') || return 1
    awk -v name="$successor" '$3 == name {print $1, $2; exit}' <<< "$listed"
}

do_successor() {
    local there script dependency=singleton
    [ ! -e "$STOP_FILE" ] || { echo "refused The stop file $STOP_FILE exists."; return; }
    [ "$next" -le "$MOST_GENERATIONS" ] || { echo "refused The chain ends after $MOST_GENERATIONS allocations."; return; }
    [ $(($(date +%s) - started)) -ge "$LEAST_UPTIME" ] || { echo "refused This allocation is younger than $LEAST_UPTIME s."; return; }
    there=$(found_in_queue) || { echo "refused Slurm does not answer."; return; }
    [ -z "$there" ] || { echo "submitted ${there%% *}"; return; }
    [ "$HANDOVER" = overlap ] || dependency="afterany:$SLURM_JOB_ID,singleton"
    script=$(scontrol show job --oneliner "$SLURM_JOB_ID" | sed -n 's/.* Command=\([^ ]*\).*/\1/p')
    [ -f "$script" ] || { echo "refused The script '$script' is not there any more."; return; }
    there=$(slurm sbatch --parsable --job-name="$successor" --dependency="$dependency" "$script" 2>&1) ||
        { echo "refused ${there//$'\n'/ }"; return; }
    echo "submitted ${there%%;*}"
}

do_recall() {
    local there
    there=$(found_in_queue) || { echo "refused Slurm does not answer."; return; }
    [[ "$there" != *PENDING ]] || slurm scancel "${there%% *}" || { echo "refused scancel failed."; return; }
    echo "done"
}

answer() {  # one errand, and what to say of it
    local verb=$1 number=$2 words
    case "$verb" in
        successor | recall)
            words="refused Generation $generation has no other errand than for the next."
            if [ "$number" = "$next" ]; then words=$("do_$verb"); fi
            ;;
        *) return ;;
    esac
    say "$verb $number $words"
    printf '%s %s %s\n' "$verb" "$number" "$words" >&4
}

# -- the worker -------------------------------------------------------------------------------------------------------

scratch=$(mktemp -d "${TMPDIR:-/tmp}/edif-hpc-$SLURM_JOB_ID-XXXXXX") || give_up "There is no room for scratch files."
trap 'rm -rf "$scratch"' EXIT
mkdir -m 700 "$scratch"/{supervisor,xdg,triton,inductor,miopen-db,miopen-cache}
mkfifo -m 600 "$scratch/supervisor/asks" "$scratch/supervisor/answers"
exec 3<> "$scratch/supervisor/asks" 4<> "$scratch/supervisor/answers"

options=(--containall --cleanenv --no-eval --pwd / "${APPTAINER[@]}" --bind "$scratch:/tmp" --bind "$EDIF_HOME")
[ -z "$CACHE" ] || options+=(--bind "$CACHE:$CACHE:ro")
[ -z "$CONFIG" ] || options+=(--bind "$CONFIG:$CONFIG:ro")
for bind in "${BINDS[@]}"; do options+=(--bind "$bind"); done
for name in SLURM_JOB_ID SLURM_JOB_NAME SLURM_JOB_PARTITION SLURMD_NODENAME SLURM_CPUS_PER_TASK "${VISIBLE[@]}"; do
    [ -z "${!name+set}" ] || options+=("--env=$name=${!name}")
done
for pair in "${PROXIES[@]}" TMPDIR=/tmp LANG=C.UTF-8 PYTHONUNBUFFERED=1 XDG_CACHE_HOME=/tmp/xdg TRITON_CACHE_DIR=/tmp/triton \
    TORCHINDUCTOR_CACHE_DIR=/tmp/inductor MIOPEN_USER_DB_PATH=/tmp/miopen-db MIOPEN_CUSTOM_CACHE_DIR=/tmp/miopen-cache; do
    options+=("--env=$pair")
done
worker=(edif-hpc worker --home "$EDIF_HOME" --id "worker-$POOL-$lineage-g$generation" --pool "$POOL" --deadline "$deadline"
    --lineage "$lineage" --generation "$generation" --supervisor /tmp/supervisor)
[ -z "$CONFIG" ] || worker+=(--config "$CONFIG")

told=
pass_on() { told=1; kill "-$1" "$child" 2> /dev/null; }
trap 'pass_on USR2' USR2
trap 'pass_on TERM' TERM INT

run_worker() {
    local status verb number
    apptainer exec "${options[@]}" "$IMAGE" "${worker[@]}" 3>&- 4>&- &
    child=$!
    while kill -0 "$child" 2> /dev/null; do
        if read -r -t 1 verb number <&3; then answer "$verb" "$number"; fi
    done
    wait "$child"
    status=$?
    say "the worker ended with status $status"
    return "$status"
}

say "generation $generation of $lineage on $(hostname), until $(date -d "@$deadline")"
for pause in 1 5 15 0; do
    began=$(date +%s)
    run_worker && exit 0
    status=$?
    # One that was told to end is not started again, nor one that cannot start, nor one without time.
    [ -z "$told" ] || exit "$status"
    [ "$pause" -gt 0 ] && [ $((began + pause + 30)) -lt "$deadline" ] || exit "$status"
    sleep "$pause"
done
