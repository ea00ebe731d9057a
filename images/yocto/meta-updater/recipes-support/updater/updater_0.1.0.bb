SUMMARY = "A/B updates that survive a power cut at any moment"
SECTION = "console/utils"
LICENSE = "Apache-2.0"
LIC_FILES_CHKSUM = "file://LICENSE;md5=3b83ef96387f14655fc854ddc3c6bd57"

inherit externalsrc python3-dir systemd update-rc.d

EXTERNALSRC = "${UPDATER_SOURCE}"
B = "${WORKDIR}/build"

RDEPENDS:${PN} = "python3-core python3-modules python3-cryptography python3-zstandard"
RRECOMMENDS:${PN}:class-target = "libubootenv-bin"

SYSTEMD_SERVICE:${PN} = "updater-resume.service updater.service"
INITSCRIPT_NAME = "updater"
INITSCRIPT_PARAMS = "defaults 95"

do_configure[noexec] = "1"
do_compile[noexec] = "1"

do_install() {
    install -d ${D}${PYTHON_SITEPACKAGES_DIR}/updater
    cp -R --no-preserve=ownership,timestamps \
        ${S}/updater/__init__.py ${S}/updater/cli.py ${S}/updater/artifact ${S}/updater/device \
        ${D}${PYTHON_SITEPACKAGES_DIR}/updater/
    if [ -d ${S}/updater/modules ]; then
        cp -R --no-preserve=ownership,timestamps ${S}/updater/modules \
            ${D}${PYTHON_SITEPACKAGES_DIR}/updater/
    fi
    find ${D}${PYTHON_SITEPACKAGES_DIR} -name __pycache__ -type d -prune -exec rm -rf {} +
    find ${D}${PYTHON_SITEPACKAGES_DIR} -name '*.md' -delete

    install -D -m 0755 ${S}/images/package/root/usr/bin/updater ${D}${bindir}/updater
    install -D -m 0755 ${S}/images/package/root/usr/lib/updater/at-boot ${D}/usr/lib/updater/at-boot
    install -D -m 0755 ${S}/images/package/root/etc/init.d/updater ${D}${sysconfdir}/init.d/updater
    install -d ${D}${systemd_system_unitdir}
    install -m 0644 ${S}/images/package/root/usr/lib/systemd/system/*.service \
        ${D}${systemd_system_unitdir}/
    install -d ${D}${sysconfdir}/updater/health.d
}

FILES:${PN} += "${PYTHON_SITEPACKAGES_DIR}/updater /usr/lib/updater ${systemd_system_unitdir}"

BBCLASSEXTEND = "native"
