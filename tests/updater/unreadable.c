/* A medium of which one block of one file can't be read, under the real SQLite.
 *
 * UNREADABLE="INODE N": block N (4096 bytes) of that file fails with EIO, until all of it is written
 * or it is a new block; a write to a part of it fails, too, as Linux would have to read the rest.
 * DIE_IN=PATH: the process ends at its first write to PATH, as by a power cut.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BLOCK = 4096 };

static int mended;

static int is_file(int fd, const char *path, size_t length) {
    char link[64], found[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t got = readlink(link, found, sizeof found);
    return got >= 0 && (size_t)got == length && !memcmp(found, path, length);
}

static int is_bad(int fd, size_t count, off_t offset, off_t *block) {
    const char *told = getenv("UNREADABLE");
    char *number;
    struct stat found;
    if (mended || !told || fstat(fd, &found) || found.st_ino != strtoul(told, &number, 10)) return 0;
    *block = (off_t)atol(number) * BLOCK;
    if (found.st_size <= *block) return !(mended = 1);
    return offset < *block + BLOCK && *block < offset + (off_t)count;
}

ssize_t pread64(int fd, void *data, size_t count, off_t offset) {
    static ssize_t (*real)(int, void *, size_t, off_t);
    off_t block;
    if (!real) real = dlsym(RTLD_NEXT, "pread64");
    if (is_bad(fd, count, offset, &block)) {
        errno = EIO;
        return -1;
    }
    return real(fd, data, count, offset);
}

ssize_t pwrite64(int fd, const void *data, size_t count, off_t offset) {
    static ssize_t (*real)(int, const void *, size_t, off_t);
    const char *last = getenv("DIE_IN");
    off_t block;
    if (!real) real = dlsym(RTLD_NEXT, "pwrite64");
    if (last && is_file(fd, last, strlen(last))) _exit(9);
    if (is_bad(fd, count, offset, &block)) {
        if (offset > block || offset + (off_t)count < block + BLOCK) {
            errno = EIO;
            return -1;
        }
        mended = 1;
    }
    return real(fd, data, count, offset);
}

ssize_t pread(int fd, void *data, size_t count, off_t offset) {
    return pread64(fd, data, count, offset);
}

ssize_t pwrite(int fd, const void *data, size_t count, off_t offset) {
    return pwrite64(fd, data, count, offset);
}
