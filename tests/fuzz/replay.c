/* Runs a fuzz target over files and directories of files, without libFuzzer: replay_NAME PATH...
 * Fails if a path cannot be read or if there was no file at all; what the target finds ends the
 * process. */
#include <dirent.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "fuzz.h"

static long files;

static int replay_file(const char *path)
{
    struct stat info;
    FILE *file = fopen(path, "rb");
    if (file == NULL || fstat(fileno(file), &info) != 0) {
        perror(path);
        return 1;
    }
    uint8_t *data =
        malloc((size_t)info.st_size + 1); /* exact size, so that ASan sees one past it */
    size_t bytes = data == NULL ? 0 : fread(data, 1, (size_t)info.st_size, file);
    fclose(file);
    uint8_t *exact = realloc(data, bytes > 0 ? bytes : 1);
    (void)LLVMFuzzerTestOneInput(exact, bytes);
    free(exact);
    files++;
    return 0;
}

static int replay(const char *path)
{
    DIR *dir = opendir(path);
    const struct dirent *entry;
    int failed = 0;
    if (dir == NULL) {
        return replay_file(path);
    }
    while ((entry = readdir(dir)) != NULL) {
        char inner[4096];
        if (entry->d_name[0] != '.') {
            (void)snprintf(inner, sizeof inner, "%s/%s", path, entry->d_name);
            failed |= replay_file(inner);
        }
    }
    closedir(dir);
    return failed;
}

int main(int argc, char **argv)
{
    int failed = 0;
    for (int i = 1; i < argc; i++) {
        failed |= replay(argv[i]);
    }
    printf("%ld files\n", files);
    return failed != 0 || files == 0;
}
