#!/bin/sh
# Start the Ray of one machine of several, in the foreground, so that other users of the machine cannot enter it.
#   ray-node.sh head ADDRESS [options of `ray start`]             on the first machine, at one of its addresses
#   ray-node.sh join HEAD:PORT ADDRESS [options of `ray start`]   on each other one
# RAY_AUTH_TOKEN_PATH (default ~/.longreach-ray-token, mode 0600): the secret of this Ray, made by `head`, the same
# file on every machine. RAY_FOLDER (default /tmp/longreach-ray-UID, mode 0700): Ray's sockets and logs.
set -eu
umask 077

fail() {
    echo "ray-node.sh: $*" >&2
    exit 2
}

# others can neither enter a folder nor replace a file that belongs to somebody else
owner_and_mode() {
    stat -c '%u %a' "$1" 2>/dev/null || stat -f '%u %Lp' "$1"
}

[ $# -ge 2 ] || fail "usage: ray-node.sh head ADDRESS [OPTIONS] | ray-node.sh join HEAD:PORT ADDRESS [OPTIONS]"
what=$1
shift
case $what in
head)
    set -- --head --port=6379 --include-dashboard=false --node-ip-address="$@"
    ;;
join)
    [ $# -ge 2 ] || fail "join: needs HEAD:PORT and an address of this machine"
    head=$1
    shift
    set -- --address="$head" --node-ip-address="$@"
    ;;
*) fail "$what: must be head or join" ;;
esac

token=${RAY_AUTH_TOKEN_PATH:-$HOME/.longreach-ray-token}
if [ "$what" = head ] && [ ! -e "$token" ]; then
    od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$token"
fi
[ -r "$token" ] || fail "RAY_AUTH_TOKEN_PATH: $token: copy it from the first machine"
case $(owner_and_mode "$token") in
"$(id -u) 600" | "$(id -u) 400") ;;
*) fail "RAY_AUTH_TOKEN_PATH: $token: must be yours alone; chmod 600 $token" ;;
esac

folder=${RAY_FOLDER:-/tmp/longreach-ray-$(id -u)}
mkdir -p "$folder"
[ ! -L "$folder" ] && [ "$(owner_and_mode "$folder")" = "$(id -u) 700" ] ||
    fail "RAY_FOLDER: $folder: must be a folder that is yours alone; chmod 700 $folder, or name another"

unset RAY_AUTH_TOKEN
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token"
# Ray counts mapped weights as memory in use and would kill stages; they are no background work either
export RAY_memory_monitor_refresh_ms=0 RAY_worker_niceness=0 RAY_USAGE_STATS_ENABLED=0
# a machine whose Ray is gone counts as lost after 5 s instead of 15; one that answers late, after 50 s as ever
export RAY_health_check_period_ms=1000
# Ray opens its own folder to everybody, so it is inside; nothing of ours goes through the object store, which has the
# smallest size that Ray takes
exec ray start --block --disable-usage-stats --temp-dir="$folder/ray" --object-store-memory=80000000 "$@"
