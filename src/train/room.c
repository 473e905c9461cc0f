#include "train/room.h"

#include <unistd.h>

size_t qs_room_on_host(int local_nranks)
{
    const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    return pages > 0 && page > 0 ? (size_t)pages * (size_t)page / (size_t)local_nranks
                                 : (size_t)INT64_MAX;
}

size_t qs_room_within(size_t there, int64_t limit_bytes)
{
    return limit_bytes > 0 && (size_t)limit_bytes < there ? (size_t)limit_bytes : there;
}

size_t qs_room_here(const qs_device *device, int64_t limit_bytes, const qs_comm *world)
{
    size_t free_bytes = 0, total_bytes = 0;
    qs_device_memory(device, &free_bytes, &total_bytes);
    const bool is_host = total_bytes == 0;
    return qs_room_within(is_host ? qs_room_on_host(qs_comm_local_nranks(world)) : free_bytes,
                          limit_bytes);
}
