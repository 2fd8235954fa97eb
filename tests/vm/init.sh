#!/bin/busybox sh
# The guest's init.  It runs twice: first as /init of the initramfs, where it builds the root file system out of
# the host's, then (after switch_root) as PID 1 in it, where it runs the command.  run.py tells it what to do by
#   vm.ext4       on the kernel command line: /dev/vda is a scratch disk, to be mounted at /mnt/ext4
#   vm.modules=D  on the kernel command line: the host directory to mount at /lib/modules
#   command       in the 9p share `lane`: a shell script, to be run as the command
#   visible       in the same share: host directories below /tmp that the guest is to see, one a line
# and learns from it by the file `status` in the share, and by two virtio ports named stdout and stderr.
#
# Debian's busybox is built with FEATURE_SH_STANDALONE: once /proc is there, its shell finds its own applets
# before it looks at PATH, so nothing here depends on what the host has installed.

fail() {
    echo "vm: $*"
    poweroff -f
}

first_stage() {
    /bin/busybox mount -t proc proc /proc
    mount -t sysfs sys /sys
    mount -t devtmpfs dev /dev
    while read -r module; do
        insmod "/modules/$module.ko" || fail "insmod $module"
    done < /modules/order

    # The root: the host's, read-only, under a tmpfs that takes the writes.
    nine="trans=virtio,version=9p2000.L,msize=512000,access=any"
    mount -t 9p host /lower -o "ro,$nine,cache=loose" || fail "cannot mount the host's root"
    mount -t tmpfs tmpfs /upper -o size=75%,mode=755
    mkdir /upper/upper /upper/work
    mount -t overlay overlay /root -o lowerdir=/lower,upperdir=/upper/upper,workdir=/upper/work ||
        fail "cannot mount the overlay"

    mkdir -p /root/proc /root/sys /root/dev /root/run /root/tmp
    mount -t tmpfs tmpfs /root/run -o mode=755
    mkdir -p /root/run/vm/lane /root/run/vm/bin
    mount -t 9p lane /root/run/vm/lane -o "$nine" || fail "cannot mount the share of the lane"
    # Into the guest's own /run: the host may have a busybox elsewhere, or its command may replace it.
    cp /bin/busybox /init /root/run/vm/bin/
    mount --move /sys /root/sys
    mount --move /dev /root/dev
    mount --move /proc /root/proc  # from here on, applets need their path
    exec /bin/busybox switch_root /root /run/vm/bin/busybox sh /run/vm/bin/init second
}

second_stage() {
    mkdir -p /dev/pts /dev/shm /mnt/ext4 /lib/modules
    mount -t devpts devpts /dev/pts -o mode=620,gid=5,ptmxmode=666
    mount -t tmpfs tmpfs /dev/shm -o mode=1777
    for link in fd: stdin:/0 stdout:/1 stderr:/2; do
        [ -e "/dev/${link%%:*}" ] || ln -s "/proc/self/fd${link#*:}" "/dev/${link%%:*}"
    done

    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    for controller in cpu memory pids io cpuset; do
        echo "+$controller" > /sys/fs/cgroup/cgroup.subtree_control || fail "no cgroup controller $controller"
    done
    mount -t bpf bpf /sys/fs/bpf
    mount -t tracefs tracefs /sys/kernel/tracing
    mount -t debugfs debugfs /sys/kernel/debug
    mount -t securityfs securityfs /sys/kernel/security

    ext4=
    read -r words < /proc/cmdline
    for word in $words; do
        case $word in
            vm.modules=*) mount --bind "${word#*=}" /lib/modules || fail "cannot mount ${word#*=}" ;;
            vm.ext4) ext4=yes ;;
        esac
    done
    [ -z "$ext4" ] || mount -t ext4 /dev/vda /mnt/ext4 || fail "cannot mount the scratch disk"
    # So that the kernel can load modules by itself (a loop device, a netfilter table) on hosts without kmod.
    if ! [ -x /sbin/modprobe ]; then
        ln -s busybox /run/vm/bin/modprobe
        echo /run/vm/bin/modprobe > /proc/sys/kernel/modprobe
    fi

    # The host's /tmp stays out of sight, apart from what was asked for.
    mkdir /run/vm/tmp
    mount --bind /tmp /run/vm/tmp
    mount -t tmpfs tmpfs /tmp -o mode=1777
    while read -r directory; do
        mkdir -p "$directory"
        mount --bind "/run/vm/tmp/${directory#/tmp/}" "$directory" || fail "cannot show $directory"
    done < /run/vm/lane/visible

    ip link set lo up
    echo vm > /proc/sys/kernel/hostname

    # A virtio port can be opened once, a pipe as often as the command likes (echo oops > /dev/stderr).
    relays=
    for port in /sys/class/virtio-ports/*; do
        read -r stream < "$port/name"
        mkfifo "/run/vm/$stream"
        cat < "/run/vm/$stream" > "/dev/${port##*/}" &
        relays="$relays $! "
    done
    read -r uptime idle < /proc/uptime
    echo "vm: ready after $uptime s"

    setsid /bin/sh /run/vm/lane/command < /dev/null > /run/vm/stdout 2> /run/vm/stderr &
    wait $!
    status=$?
    # What the command left running may hold the pipes open; the relays would wait for it for ever.
    for process in /proc/[0-9]*; do
        pid=${process#/proc/}
        case " 1 $relays" in *" $pid "*) ;; *) kill -9 "$pid" 2> /dev/null ;; esac
    done
    wait $relays
    # Renamed into place: a status that is there is complete.
    echo $status > /run/vm/lane/status.new
    mv /run/vm/lane/status.new /run/vm/lane/status
    read -r uptime idle < /proc/uptime
    echo "vm: status $status after $uptime s"
    poweroff -f
}

if [ "$1" = second ]; then second_stage; else first_stage; fi
