set -eu
if ! command -v apt-get >/dev/null; then
  echo "this base image has no apt-get: banger image build knows Debian and what is made of it" >&2
  exit 1
fi
# The agent answers before the system is up, and packages start services.
if [ -d /run/systemd/system ]; then
  for _ in $(seq 120); do
    case $(systemctl is-system-running --wait 2>/dev/null) in
      running | degraded) break ;;
    esac
    sleep 1
  done
fi
# The work seed begins with what the base has in /root, which the work disk hides.
if [ -n "$OWN_HOME" ]; then
  below=$(mktemp -d /run/banger-base.XXXXXX)
  mount --bind / "$below"
  cp -a "$below/root/." /root/
  umount "$below"
  rmdir "$below"
fi
chmod 700 /root
