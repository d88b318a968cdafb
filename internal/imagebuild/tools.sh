set -eu
rm -rf /usr/local/lib/opencode /root/.tmux/plugins/tmux-resurrect /root/.tmux/plugins/tmux-continuum
tar -xf - -C / --no-same-owner
ln -sfn ../lib/opencode/bin/opencode /usr/local/bin/opencode

# For shells that people log in to, and for interactive ones.
cat > /etc/profile.d/banger-mise.sh <<'END'
# Written by banger image build.
if [ -n "${BASH_VERSION-}" ] && [ -x /usr/local/bin/mise ]; then
  eval "$(/usr/local/bin/mise activate bash)"
fi
END
if ! grep -q 'banger-mise' /etc/bash.bashrc 2>/dev/null; then
  printf '\n# Written by banger image build.\nif [ -r /etc/profile.d/banger-mise.sh ]; then . /etc/profile.d/banger-mise.sh; fi\n' >> /etc/bash.bashrc
fi

# opencode through mise, without a download: mise is told where it lies.
export HOME=/root MISE_OFFLINE=1
version=$OPENCODE_VERSION
if [ -z "$version" ]; then
  # It may not run on this CPU: an emulated one lacks instructions.
  version=$(/usr/local/bin/opencode --version 2>/dev/null | tail -n 1) || version=
fi
version=${version:-local}
/usr/local/bin/mise link --force "opencode@$version" /usr/local/lib/opencode
/usr/local/bin/mise use --global "opencode@$version"

# Sessions of tmux are saved every 15 minutes, and restored when somebody asks (prefix, Ctrl-R).
touch /root/.tmux.conf
if ! grep -q 'banger image build' /root/.tmux.conf; then
  cat >> /root/.tmux.conf <<'END'
# Written by banger image build: sessions are saved every 15 minutes, prefix Ctrl-S saves now, prefix Ctrl-R restores.
set -g @continuum-save-interval '15'
set -g @continuum-restore 'off'
run-shell /root/.tmux/plugins/tmux-resurrect/resurrect.tmux
run-shell /root/.tmux/plugins/tmux-continuum/continuum.tmux
END
fi
echo "mise $(/usr/local/bin/mise --version | head -n 1), opencode $version"
