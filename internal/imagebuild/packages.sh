set -eu
export DEBIAN_FRONTEND=noninteractive
# Asked once: on an emulated CPU every program takes its time.
have=" $(dpkg-query -W -f '${db:Status-Abbrev} ${Package}\n' | sed -n 's/^ii *//p' | tr '\n' ' ')"
missing=
for p in $PACKAGES; do
  case $have in
    *" ${p#\?} "*) ;;
    *) missing="$missing $p" ;;
  esac
done
wanted=
if [ -n "$missing" ]; then
  # A wait for the network, which a guest has a moment after it booted.
  apt-get -o Acquire::Retries=3 update
  for p in $missing; do
    case $p in
      # Packages that only some releases have.
      \?*) if apt-cache show "${p#\?}" >/dev/null 2>&1; then wanted="$wanted ${p#\?}"; fi ;;
      *) wanted="$wanted $p" ;;
    esac
  done
fi
if [ -n "$wanted" ]; then
  echo "installing$wanted"
  # shellcheck disable=SC2086
  apt-get -o Acquire::Retries=3 -y --no-install-recommends install $wanted
else
  echo "all packages are there already"
fi
if [ -n "$DOCKER" ]; then
  # Docker starts when its socket is used, so that a VM without it boots faster.
  if command -v systemctl >/dev/null; then
    systemctl --root=/ disable docker.service containerd.service
    systemctl --root=/ enable docker.socket
  else
    echo "this base has no systemd: dockerd is installed, and nothing starts it"
  fi
fi
