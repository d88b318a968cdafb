#!/bin/sh
# Makes the unpacked packages in the directory $1 into the emulated host: who may log in, its network, and
# what it does when it has booted. mmdebstrap runs it; it is part of the image's content key.
set -eu
root=$1

echo lab >"$root/etc/hostname"
printf '127.0.0.1 localhost lab\n::1 localhost\n' >"$root/etc/hosts"
echo '/dev/vda / ext4 errors=remount-ro 0 1' >"$root/etc/fstab"

# QEMU's user network has these addresses; static, so that there is nothing to wait for.
cat >"$root/etc/systemd/network/10-lab.network" <<'END'
[Match]
Driver=virtio_net
[Network]
Address=10.0.2.15/24
Gateway=10.0.2.2
DNS=10.0.2.3
IPv6AcceptRA=no
END
printf 'kvm_amd\ntun\nvhost_vsock\noverlay\n' >"$root/etc/modules-load.d/lab.conf"

# An ordinary user as on a person's machine: in group kvm, may use sudo.
chroot "$root" useradd --create-home --shell /bin/bash --groups kvm,sudo user
echo '%sudo ALL=(ALL) NOPASSWD: ALL' >"$root/etc/sudoers.d/lab"
chmod 440 "$root/etc/sudoers.d/lab"
for home in root home/user; do
    mkdir -p "$root/$home/.ssh"
    echo "$LAB_PUBLIC_KEY" >"$root/$home/.ssh/authorized_keys"
    chmod 700 "$root/$home/.ssh"
done
chroot "$root" chown -R user:user /home/user/.ssh
# The checkouts below belong to whoever packed them.
printf '[safe]\n\tdirectory = *\n' >"$root/etc/gitconfig"

mkdir -p "$root/payload" "$root/layers"
# Go is on the second disk, if at all, with all it needs.
ln -s /payload/go/bin/go "$root/usr/local/bin/go"
printf 'GOTOOLCHAIN=local\nGOPROXY=off\nGOFLAGS=-modcacherw\n' >>"$root/etc/environment"
cat >"$root/usr/local/sbin/lab-ready" <<'END'
#!/bin/sh
# Gives root and the ordinary user a checkout of their own, ~/banger, and caches, ~/.cache and ~/go, over the
# read-only ones on the second disk, and says on the console that the host is ready. What is written to
# them is on the host's own disk. Owners change without a copy of the content (metacopy).
set -eu
layer() { # <user> <directory of the second disk> <mount point>
    local layer
    layer=/layers/$1-$(basename "$2")
    new=
    [ -e "$layer" ] || new=yes
    mkdir -p "$layer/upper" "$layer/work" "$3"
    mount -t overlay -o "lowerdir=/payload/$2,upperdir=$layer/upper,workdir=$layer/work,metacopy=on" overlay "$3"
    [ -z "$new" ] || chown "$1:$1" "$3"
}
if [ -b /dev/vdb ]; then
    mount -t ext4 -o ro /dev/vdb /payload
    for user in root user; do
        home=$(getent passwd "$user" | cut -d : -f 6)
        layer "$user" home/cache "$home/.cache"
        layer "$user" home/go "$home/go"
        layer "$user" banger "$home/banger"
        [ -z "$new" ] || chown -R "$user:$user" "$home/banger"
        # What banger built is its user's, the time of its use is written down.
        [ ! -e "$home/.cache/banger" ] || chown -R "$user:$user" "$home/.cache/banger"
    done
fi
echo 'lab: ready' >/dev/ttyS0
END
chmod 755 "$root/usr/local/sbin/lab-ready"
cat >"$root/etc/systemd/system/lab-ready.service" <<'END'
[Unit]
Description=Tell the console that the lab is ready
Wants=systemd-networkd-wait-online.service
After=ssh.service systemd-networkd-wait-online.service systemd-modules-load.service systemd-resolved.service user.slice
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/local/sbin/lab-ready
StandardOutput=journal+console
StandardError=journal+console
[Install]
WantedBy=multi-user.target
END
# These are there for tests to start: a host whose rules are nobody's is what the others are on.
chroot "$root" systemctl disable --quiet docker.service docker.socket containerd.service firewalld.service ufw.service
for unit in lab-ready systemd-networkd systemd-resolved ssh; do chroot "$root" systemctl enable --quiet "$unit"; done
# Housekeeping in the middle of a test is nothing that is tested.
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service \
    fstrim.timer man-db.timer getty@tty1.service serial-getty@ttyS0.service; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
: >"$root/etc/machine-id"
rm -rf "$root/var/lib/apt/lists/"* "$root/var/cache/apt/"*.bin
