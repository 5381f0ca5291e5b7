# shellcheck shell=bash
# What the three sbatch templates have in common: run a worker in its image, watch over it, submit its successor.
#
# Needs bash, coreutils, Slurm's commands and Apptainer on the batch host. The worker asks through two pipes for what only
# the host can do, as edif_hpc/core/errands.py describes, and ends by itself when its successor has taken over.
# A template sets these and then reads this file:
#
#   EDIF_HOME     the service's home, on the shared file system        POOL        the worker's pool
#   IMAGE         the image                                            APPTAINER   options for the accelerator (array)
#   CACHE         the Hugging Face hub cache; empty: hub/ in the home  VISIBLE     its visibility variables (array)
#   CONFIG        the settings file; empty: the home's own             BINDS       further binds (array)
#   HANDOVER      overlap, or requeue where one allocation has room    PROXIES     NAME=VALUE for the worker (array)
#   NETWORK       NAME=VALUE for NCCL or RCCL (array)
#   LEAST_UPTIME  seconds before which no successor is submitted       STOP_FILE   no successor while it exists
#   MOST_GENERATIONS  after how many allocations a chain ends
#   SBATCH, SQUEUE, SCANCEL, SCONTROL  the site's names of Slurm's commands

set -u -o pipefail
started=$(date +%s)
steady=300  # seconds after which a worker is forgiven its earlier crashes
child='' errand='' told=''

say() { printf '%s %s\n' "$(date -u +%FT%TZ)" "$*"; }
give_up() { say "$*" >&2; exit 1; }

[ -n "${SLURM_JOB_ID:-}" ] || give_up "This is for sbatch: submit it."
case "$HANDOVER" in overlap | requeue) ;; *) give_up "HANDOVER is '$HANDOVER'; it is overlap or requeue." ;; esac
[[ "$POOL" =~ ^[a-z][a-z0-9-]{0,30}$ ]] || give_up "POOL is '$POOL'; a pool has small letters, digits and hyphens."
EDIF_HOME=${EDIF_HOME%/}
[ -d "$EDIF_HOME" ] || give_up "There is no home $EDIF_HOME on this node; it must be on a shared file system."
[ -f "$IMAGE" ] || give_up "There is no image $IMAGE on this node; build it with: edif-hpc image build"
command -v apptainer > /dev/null || give_up "There is no apptainer on this node; load its module in the template."

slurm() {  # SECONDS COMMAND...: one of Slurm's commands, without what this allocation's environment would tell it
    local seconds=$1 name clean=()
    shift
    while IFS= read -r name; do
        case "$name" in
            SLURM_CONF) ;;
            SLURM_* | SBATCH_* | SQUEUE_* | SCANCEL_*) clean+=(-u "$name") ;;
        esac
    done < <(compgen -e)
    timeout "$seconds" env "${clean[@]}" "$@"
}

# -- which generation of which lineage this is: it stands in the allocation's name ------------------------------------

prefix="edif-$(printf %s "$EDIF_HOME" | sha256sum | cut -c1-6)-$POOL"
if [[ "${SLURM_JOB_NAME:-}" =~ ^"$prefix"-([0-9a-f]{6})-g([0-9]+)$ ]]; then
    lineage=${BASH_REMATCH[1]} generation=${BASH_REMATCH[2]}
else
    lineage=$(printf '%s %s' "$SLURM_JOB_ID" "$started" | sha256sum | cut -c1-6) generation=1
    SLURM_JOB_NAME="$prefix-$lineage-g1"
    slurm 60 "$SCONTROL" update "JobId=$SLURM_JOB_ID" "JobName=$SLURM_JOB_NAME" ||
        give_up "Slurm did not take the name of this allocation, by which its successors are known."
fi
next=$((generation + 1))
successor="$prefix-$lineage-g$next"
id="worker-$POOL-$lineage-g$generation"

deadline=${SLURM_JOB_END_TIME:-}
if [ -z "$deadline" ]; then
    ends=$(slurm 60 "$SQUEUE" --noheader --jobs="$SLURM_JOB_ID" --format=%e) || give_up "Slurm does not tell when this ends."
    deadline=$(date -d "$ends" +%s) || give_up "Slurm printed '$ends' for the end of this allocation."
fi

# -- what the worker may ask for; each answer is one line -------------------------------------------------------------

found_in_queue() {  # prints "ID STATE" of the successor, if Slurm has it; fails when Slurm does not say
    local listed
    listed=$(slurm 60 "$SQUEUE" --noheader --user="$(id -un)" --format='%A|%T|%j') || return 1
    awk -F '|' -v name="$successor" '
        NF < 3 || $3 == name && ($1 !~ /^[0-9]+$/ || $2 !~ /^[A-Z_]+$/) { unread = 1 }
        $3 == name && !seen { seen = $1 " " $2 }
        END { if (unread) exit 1; if (seen) print seen }' <<< "${listed:-0|NONE|}"
}

do_successor() {
    local there script said dependency=singleton
    there=$(found_in_queue) || { echo "refused Slurm does not tell what there is, so nothing was submitted."; return; }
    if [ -n "$there" ]; then echo "submitted ${there%% *}"; return; fi
    if [ -e "$STOP_FILE" ]; then echo "refused The stop file $STOP_FILE exists."; return; fi
    if [ "$next" -gt "$MOST_GENERATIONS" ]; then
        echo "refused The chain ends after $MOST_GENERATIONS allocations."
        return
    fi
    if [ $(($(date +%s) - started)) -lt "$LEAST_UPTIME" ]; then
        echo "refused This allocation is younger than $LEAST_UPTIME s."
        return
    fi
    if [ "$HANDOVER" = requeue ]; then dependency="afterany:$SLURM_JOB_ID,singleton"; fi
    # This is Slurm's copy; the original is what an admin may have changed meanwhile.
    script=$(slurm 60 "$SCONTROL" show job --oneliner "$SLURM_JOB_ID" | sed -n 's/.* Command=\([^ ]*\).*/\1/p')
    if [ ! -f "$script" ]; then echo "refused The script '$script' that this was submitted from is gone."; return; fi
    said=$(slurm 120 "$SBATCH" --parsable --no-requeue --job-name="$successor" --dependency="$dependency" "$script" 2>&1) ||
        { echo "refused ${said//$'\n'/ }"; return; }
    if [[ $'\n'"$said" =~ $'\n'([0-9]+)(;[^$'\n']*)?$ ]]; then echo "submitted ${BASH_REMATCH[1]}"; return; fi
    echo "refused sbatch printed no id: ${said//$'\n'/ }"
}

do_recall() {
    local there
    there=$(found_in_queue) || { echo "refused Slurm does not tell what there is."; return; }
    if [[ "$there" = *" PENDING" ]]; then
        slurm 60 "$SCANCEL" --quiet --state=PENDING "${there%% *}" || { echo "refused scancel failed."; return; }
    fi
    echo "done"
}

run_errand() {  # VERB GENERATION
    local words="refused Generation $generation has no other errand than for the next."
    case "$1 $2" in
        "successor $next") words=$(do_successor) ;;
        "recall $next") words=$(do_recall) ;;
    esac
    say "$1 $2 $words"
    printf '%s %s %s\n' "$1" "$2" "${words:0:3900}" >&4
}

# -- the worker -------------------------------------------------------------------------------------------------------

scratch=$(mktemp -d "${TMPDIR:-/tmp}/edif-hpc-$SLURM_JOB_ID-XXXXXX") || give_up "There is no room for scratch files."
trap 'rm -rf "$scratch"' EXIT
mkdir -m 700 "$scratch"/{supervisor,xdg,triton,inductor,miopen-db,miopen-cache}
mkfifo -m 600 "$scratch/supervisor/asks" "$scratch/supervisor/answers"
exec 3<> "$scratch/supervisor/asks" 4<> "$scratch/supervisor/answers"

options=(--containall --cleanenv --no-eval --pwd / "${APPTAINER[@]}" --bind "$scratch:/tmp" --bind "$EDIF_HOME")
if [ -n "$CACHE" ]; then options+=(--bind "$CACHE:$CACHE:ro"); fi
if [ -n "$CONFIG" ]; then options+=(--bind "$CONFIG:$CONFIG:ro"); fi
for bind in "${BINDS[@]}"; do options+=(--bind "$bind"); done
for place in "$EDIF_HOME" "$CACHE"; do  # what is bound below the container's /tmp needs a place to be mounted onto
    if [[ "$place" = /tmp/* ]]; then mkdir -p "$scratch/${place#/tmp/}"; fi
done
for name in SLURM_JOB_ID SLURM_JOB_NAME SLURM_JOB_PARTITION SLURMD_NODENAME SLURM_CPUS_PER_TASK; do
    if [ -n "${!name+set}" ]; then options+=("--env=$name=${!name}"); fi
done
for name in "${VISIBLE[@]}"; do  # Slurm may set several that hide devices, and together they hide more: the first
    if [ -n "${!name+set}" ]; then options+=("--env=$name=${!name}"); break; fi
done
for pair in "${PROXIES[@]}" "${NETWORK[@]}" TMPDIR=/tmp LANG=C.UTF-8 PYTHONUNBUFFERED=1 XDG_CACHE_HOME=/tmp/xdg \
    TRITON_CACHE_DIR=/tmp/triton TORCHINDUCTOR_CACHE_DIR=/tmp/inductor \
    MIOPEN_USER_DB_PATH=/tmp/miopen-db MIOPEN_CUSTOM_CACHE_DIR=/tmp/miopen-cache; do
    options+=("--env=$pair")
done
worker=(edif-hpc worker --home "$EDIF_HOME" --id "$id" --pool "$POOL" --deadline "$deadline"
    --lineage "$lineage" --generation "$generation" --supervisor /tmp/supervisor
    --handover "$HANDOVER")
if [ -n "$CONFIG" ]; then worker+=(--config "$CONFIG"); fi

# shellcheck disable=SC2317  # the traps call it
pass_on() {
    told=$1
    if [ -n "$child" ]; then kill "-$1" "$child" 2> /dev/null; fi
}
trap 'pass_on USR2' USR2
trap 'pass_on TERM' TERM INT

busy() { [ -n "$1" ] && kill -0 "$1" 2> /dev/null; }

watch_over() {  # until the worker has ended: errands one after the other, in the background, so that signals pass meanwhile
    local verb number
    while busy "$child"; do
        if busy "$errand"; then
            sleep 0.5
        elif read -r -t 1 verb number <&3 && [[ "$verb" = successor || "$verb" = recall ]]; then
            run_errand "$verb" "$number" &
            errand=$!
        fi
    done
}

say "generation $generation of $lineage on $(hostname), until $(date -d "@$deadline")"
say "the worker's words: $EDIF_HOME/logs/$id.log"
status=0 crashes=0
while [ -z "$told" ]; do
    began=$SECONDS child=''
    apptainer exec "${options[@]}" "$IMAGE" "${worker[@]}" 3>&- 4>&- < /dev/null >> "$EDIF_HOME/logs/$id.log" 2>&1 &
    child=$!
    if [ -n "$told" ]; then kill "-$told" "$child"; fi  # it came after the look above, when there was no child yet
    watch_over
    wait "$child"
    status=$?
    say "the worker ended with status $status"
    # One that was told to end is not started again, nor one without time; one that lived long is forgiven its crashes.
    if [ "$status" = 0 ] || [ -n "$told" ]; then break; fi
    if [ $((SECONDS - began)) -gt "$steady" ]; then crashes=0; fi
    crashes=$((crashes + 1))
    case $crashes in 1) pause=1 ;; 2) pause=5 ;; 3) pause=15 ;; *) break ;; esac
    if [ $(($(date +%s) + pause + 30)) -gt "$deadline" ]; then break; fi
    sleep "$pause"
done
while busy "$errand"; do sleep 0.5; done  # an allocation that is being submitted must be known
exit "$status"
