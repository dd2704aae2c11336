# shellcheck shell=bash
# What the scripts beside this one share: torchrun, its exit code, and time to save. Arguments: of torchrun, then
# configuration and overrides.
# torchrun starts all ranks again when one of them ends with anything but 0, and ends with 1 itself. Where another start
# would change nothing (4: not finite) or is not wanted (6: stopped by a signal or the clock, after a save), rank.sh
# tells it 0 and leaves the code in $CODES, and this script ends with it; a rank that starts again takes its own away.
# On SIGTERM torchrun passes it on; its ranks have GRACE seconds to finish the step and save.
CODES=$(mktemp -d)
export CODES
"${PYTHON:-python}" -m torch.distributed.run --shutdown-timeout "${GRACE:-300}" "$@" &
launcher=$!
trap 'kill -TERM "$launcher" || true' TERM INT
while kill -0 "$launcher" 2>/dev/null; do # a signal interrupts wait
    wait "$launcher" && code=0 || code=$?
done
for left in "$CODES"/*; do
    if [[ -s $left ]]; then code=$(<"$left"); fi
done
rm -r "$CODES"
exit "$code"
