# Steps under one limit. Sourced by gpu_check.sh, which sets:
#   total    seconds that all may take, counted from the shell's start (SECONDS)
#   reserve  how many of them what follows the steps may take
#   work     a folder for each step's output
#   summary  a file that the one line of each step goes to
#   only     names of steps, each between commas: no other runs; all where it is empty

failed=0
# Between SIGINT, on which pytest still writes what it has, and SIGKILL.
grace=${grace:-5}
# A shell in the background ignores SIGINT, and so would all that it starts.
interruptible=()
env --default-signal=INT true 2>/dev/null && interruptible=(env --default-signal=INT)

say() { printf '[%4ds] %s\n' "$SECONDS" "$*" | tee -a "$summary"; }

last_line() { grep -v '^ *$' "$1" | tail -n 1 | cut -c 1-200; }

# step NAME LIMIT command...: at most LIMIT seconds, and never more than what is left of all. The
# output goes to $work/NAME.txt, its last line to the summary.
step() {
  local name=$1 limit=$2 left=$((total - reserve - grace - SECONDS)) start=$SECONDS status
  shift 2
  [[ -z ${only:-} || $only == *,"$name",* ]] || return 0
  [ "$limit" -le "$left" ] || limit=$left
  if [ "$limit" -lt 1 ]; then
    say "$name: LEFT OUT: no time is left"
    failed=1
    return 1
  fi
  timeout -s INT -k "$grace" "$limit" "${interruptible[@]}" "$@" >"$work/$name.txt" 2>&1
  status=$?
  case $status in
    0) say "$name: ok in $((SECONDS - start)) s: $(last_line "$work/$name.txt")" ;;
    5) say "$name: nothing to run" ;;
    124 | 137) say "$name: STOPPED after $limit s: $(last_line "$work/$name.txt")" ;;
    *) say "$name: FAILED ($status): $(last_line "$work/$name.txt")" ;;
  esac
  [ "$status" = 0 ] || [ "$status" = 5 ] && return 0
  failed=1
  return 1
}
