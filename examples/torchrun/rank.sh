#!/usr/bin/env bash
# One rank under torchrun, see launch.sh: rank.sh COMMAND...
trap : TERM USR1 # they reach the command too, which saves; this shell waits for it
rm -f "$CODES/$RANK"
"$@"
code=$?
case $code in
4 | 6)
    echo "$code" >"$CODES/$RANK"
    exit 0
    ;;
esac
exit "$code"
