# An image that devices can be updated to: brings the client and its configuration into the root
# file system, and adds the image type `updater`, an artifact made of the ext4 image.
#
#   IMAGE_CLASSES += "updater-image"
#   IMAGE_FSTYPES += "updater"
#   UPDATER_DEVICE_TYPE = "my-board"
#   UPDATER_SLOT_A = "/dev/mmcblk0p2"
#   UPDATER_SLOT_B = "/dev/mmcblk0p3"

UPDATER_ARTIFACT_NAME ?= "${IMAGE_BASENAME}-${DISTRO_VERSION}"
UPDATER_DEVICE_TYPE ?= "${MACHINE}"
UPDATER_DATA_DIR ?= "/data/updater"
UPDATER_SLOT_A ?= ""
UPDATER_SLOT_B ?= ""
UPDATER_SLOT_A_NUMBER ?= "2"
UPDATER_SLOT_B_NUMBER ?= "3"
UPDATER_FW_ENV_CONFIG ?= "/etc/fw_env.config"
# A public key on the build host that the device will trust; and the private one that signs.
UPDATER_VERIFY_KEY ?= ""
UPDATER_SIGN_KEY ?= ""
UPDATER_SERVER ?= ""
UPDATER_COMPRESSION ?= "zstd"

IMAGE_INSTALL:append = " updater"
ROOTFS_POSTPROCESS_COMMAND += "updater_configure"

updater_configure() {
    if [ -z "${UPDATER_SLOT_A}" ] || [ -z "${UPDATER_SLOT_B}" ]; then
        bbfatal "updater-image: set UPDATER_SLOT_A and UPDATER_SLOT_B"
    fi
    install -d ${IMAGE_ROOTFS}/etc/updater/health.d
    echo "artifact_name=${UPDATER_ARTIFACT_NAME}" > ${IMAGE_ROOTFS}/etc/updater/artifact_info
    {
        echo 'device_type = "${UPDATER_DEVICE_TYPE}"'
        echo 'data_dir = "${UPDATER_DATA_DIR}"'
        echo 'artifact_info = "/etc/updater/artifact_info"'
        echo '[slots]'
        echo 'a = {device = "${UPDATER_SLOT_A}", number = ${UPDATER_SLOT_A_NUMBER}}'
        echo 'b = {device = "${UPDATER_SLOT_B}", number = ${UPDATER_SLOT_B_NUMBER}}'
        echo '[bootenv]'
        echo 'kind = "uboot"'
        echo 'fw_env_config = "${UPDATER_FW_ENV_CONFIG}"'
        echo '[health]'
        echo 'directory = "/etc/updater/health.d"'
        if [ -n "${UPDATER_VERIFY_KEY}" ]; then
            echo '[trust]'
            echo 'artifact_keys = ["/etc/updater/artifact-key.pem"]'
        fi
        if [ -n "${UPDATER_SERVER}" ]; then
            echo '[server]'
            echo 'url = "${UPDATER_SERVER}"'
        fi
    } > ${IMAGE_ROOTFS}/etc/updater/updater.toml
    if [ -n "${UPDATER_VERIFY_KEY}" ]; then
        install -m 0644 ${UPDATER_VERIFY_KEY} ${IMAGE_ROOTFS}/etc/updater/artifact-key.pem
    fi
}

IMAGE_TYPES += "updater"
IMAGE_TYPEDEP:updater = "ext4"
do_image_updater[depends] += "updater-native:do_populate_sysroot python3-native:do_populate_sysroot"
do_image_updater[depends] += "python3-cryptography-native:do_populate_sysroot"
do_image_updater[depends] += "python3-zstandard-native:do_populate_sysroot"

IMAGE_CMD:updater () {
    set -- artifact write rootfs-image \
        -f ${IMGDEPLOYDIR}/${IMAGE_NAME}${IMAGE_NAME_SUFFIX}.ext4 \
        -n "${UPDATER_ARTIFACT_NAME}" -t "${UPDATER_DEVICE_TYPE}" \
        --compression ${UPDATER_COMPRESSION} --no-progress \
        -o ${IMGDEPLOYDIR}/${IMAGE_NAME}${IMAGE_NAME_SUFFIX}.updater
    if [ -n "${UPDATER_SIGN_KEY}" ]; then
        set -- "$@" -k "${UPDATER_SIGN_KEY}"
    fi
    nativepython3 -m updater.cli "$@"
}
