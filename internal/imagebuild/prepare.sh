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
chmod 700 /root
