# The variables' two copies, each in a file system of its own. Mounting one for writing writes its
# superblock, and a cut can tear that and so lose the copy. So both are mounted for reading, the
# copy that GRUB did not use is made the same as the one that counts ($environment), and only then
# is that one mounted for writing.
kit=/usr/lib/brownout
place=/boot/grub/mender_grubenv
device_1=@DEVICE_1@
device_2=@DEVICE_2@
mount_copy() { eval "mount -t ext4 -o $2,noatime,sync \$device_$1 $place$1"; }
block() { dd if=$1 of=$2 bs=1024 conv=notrunc,fsync 2> /dev/null; }
settled() { cmp -s $place$1/lock $kit/lock-closed; }
same() { cmp -s ${place}1/env ${place}2/env && settled 1 && settled 2; }
write_copy() {
    block $kit/lock-open $place$1/lock && block $2 $place$1/env && block $kit/lock-closed $place$1/lock
}
# A new file system comes with an open lock, so that a cut leaves the copy unsettled. GRUB may still
# take what stands there, so its superblock goes first and comes last: between them there is no copy.
fill() { eval "dd if=$2 of=\$device_$1 bs=4k $3 conv=fsync 2> /dev/null"; }
make_copy() {
    umount $place$1 2> /dev/null
    fill $1 /dev/zero count=1 && fill $1 $kit/grubenv.img "skip=1 seek=1" &&
        fill $1 $kit/grubenv.img count=1 && mount_copy $1 rw
}

# GRUB can't flush: what it wrote to copy 1 has to be on the medium before copy 2 is touched.
dd if=/dev/null of=$device_1 conv=notrunc,fsync 2> /dev/null

good=1
[ "$environment" = 2 ] && good=2
other=$((3 - good))
mount_copy $other ro
# Linux checks a superblock that GRUB takes as it is. The other copy may lack what GRUB recorded in
# this start: at worst a trial is made once more.
if ! mount_copy $good ro && settled $other; then
    good=$other
    other=$((3 - good))
fi
if [ "$environment" = 0 ] || ! settled $good; then
    # Only the variables are there, and which slot runs is known, so all of it can be made anew. One
    # copy after the other, and first the one that GRUB did not use: it asks less of a copy than we
    # do, and while there is none it starts whichever slot loads.
    echo "BROWNOUT ENV-RESTORED"
    for copy in $other $good; do
        make_copy $copy
        grub-editenv $place$copy/env set mender_boot_part=$part mender_boot_part_hex=$part
        sync
        block $kit/lock-closed $place$copy/lock
    done
else
    if same; then
        mount_copy $other remount,rw
    else
        { mount_copy $other remount,rw && write_copy $other $place$good/env && same; } ||
            { make_copy $other && write_copy $other $place$good/env; }
    fi
    mount_copy $good remount,rw
fi
