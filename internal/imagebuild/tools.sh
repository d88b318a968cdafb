set -eu
stamp=/usr/local/share/banger/tools
if [ "$(cat "$stamp" 2>/dev/null)" = "$STAMP" ] && { [ -z "$TMUX" ] || [ -d /root/.tmux/plugins ]; }; then
  echo "the base has them already:"
else
  rm -rf "$stamp" /usr/local/share/mise/installs/opencode /root/.tmux/plugins/tmux-resurrect /root/.tmux/plugins/tmux-continuum
  tar -xf - -C / --no-same-owner
fi
append() { # <file> <text>
  if [ -n "$2" ] && ! grep -qs '^# Written by banger' "$1"; then
    printf '%s' "$2" >> "$1"
  fi
}
append /etc/bash.bashrc "$BASHRC"
append /root/.tmux.conf "$TMUX"
cat "$stamp"
