/* The NCCL communicator against a libnccl that moves nothing (tests/support/fake_nccl.h): which
 * calls are made, in which order, and what happens when they fail, stall or hang.
 * (tests/test_nccl.c moves bytes.) */
#include <criterion/criterion.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/timer.h"
#include "comm/comm_nccl.h"
#include "support/fake_nccl.h"

static qs_comm *make_comm(qs_comm *host)
{
    qs_comm *comm = NULL;
    cr_assert_eq(qs_comm_nccl_create(&comm, host, &fake_device), QS_OK, "%s", qs_error_text());
    cr_assert_not_null(comm);
    return comm;
}

static void assert_says(const char *part)
{
    cr_assert_not_null(strstr(qs_error_text(), part), "'%s' is not in: %s", part, qs_error_text());
}

/* ---- what is called ---- */

Test(comm_nccl, one_rank_needs_no_nccl)
{
    qs_comm *self = NULL;
    cr_assert_eq(qs_comm_self_create(&self), QS_OK);
    qs_comm *comm = make_comm(self);
    fake_queue queue = fake_queue_make();
    cr_assert_str_eq(qs_comm_name(comm), "nccl");
    char from[4] = {1, 2, 3, 4}, to[8] = {0};
    cr_assert_eq(qs_comm_all_gather(comm, from, to, 4, &queue.base), QS_OK);
    cr_assert_eq(memcmp(from, to, 4), 0);
    cr_assert_eq(qs_comm_all_gather(comm, to, to, 4, &queue.base), QS_OK); /* in place */
    const size_t bytes = 3, send_at = 1, recv_at = 5;
    cr_assert_eq(
        qs_comm_all_to_all_v(comm, from, &bytes, &send_at, to, &bytes, &recv_at, &queue.base),
        QS_OK);
    cr_assert_eq(memcmp(from + 1, to + 5, 3), 0);
    cr_assert_str_eq(fake.calls, "copy(4) copy(3) ");
    cr_assert_eq(qs_comm_nccl_check(comm), QS_OK);
    qs_comm_destroy(comm);
    cr_assert_eq(fake_aborts, 0);
    qs_comm_destroy(self);
}

Test(comm_nccl, places_and_counters_are_the_hosts)
{
    qs_comm host = fake_host(3, 4);
    qs_comm *comm = make_comm(&host);
    cr_assert_eq(qs_comm_rank(comm), 3);
    cr_assert_eq(qs_comm_nranks(comm), 4);
    cr_assert_eq(qs_comm_local_rank(comm), 1);
    cr_assert_eq(qs_comm_local_nranks(comm), 2);
    cr_assert_eq(qs_comm_received_bytes(comm), 0);
    cr_assert_str_eq(fake.calls, "init(3/4,id,nonblocking) "); /* rank 0 alone asks for an id */
    fake_forget();
    qs_comm_destroy(comm);
    cr_assert_str_eq(fake.calls, "finalize destroy ");
    cr_assert_eq(fake_aborts, 0);
    qs_comm_fini(&host);
}

Test(comm_nccl, bytes_are_gathered_as_bytes_on_the_queues_stream)
{
    qs_comm host = fake_host(0, 4);
    fake.polls = 3; /* every call is under way for a while */
    qs_comm *comm = make_comm(&host);
    cr_assert_str_eq(fake.calls, "id init(0/4,id,nonblocking) ");
    fake_queue queue = fake_queue_make();
    fake_stream = fake_native(&queue.base);
    char send[100], recv[400];
    fake_forget();
    const uint64_t before = qs_comm_received_bytes(comm);
    cr_assert_eq(qs_comm_all_gather(comm, recv + 200, recv, 100, &queue.base), QS_OK);
    cr_assert_str_eq(fake.calls, "gather(100,u8,stream,at 200) ");
    cr_assert_eq(qs_comm_received_bytes(comm) - before, 300);
    fake_forget();
    cr_assert_eq(qs_comm_all_gather(comm, send, recv, 0, &queue.base), QS_OK);
    cr_assert_str_eq(fake.calls, "");
    qs_comm_destroy(comm);
    qs_comm_fini(&host);
}

Test(comm_nccl, pieces_go_round_the_ring_and_empty_ones_nowhere)
{
    qs_comm host = fake_host(1, 4);
    qs_comm *comm = make_comm(&host);
    fake_queue queue = fake_queue_make();
    fake_stream = fake_native(&queue.base);
    char send[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, recv[16] = {0};
    const size_t send_bytes[] = {2, 3, 0, 5}, send_at[] = {10, 0, 999, 4};
    const size_t recv_bytes[] = {1, 3, 4, 0}, recv_at[] = {0, 1, 4, 999};
    const uint64_t before = qs_comm_received_bytes(comm);
    fake_forget();
    cr_assert_eq(qs_comm_all_to_all_v(comm, send, send_bytes, send_at, recv, recv_bytes, recv_at,
                                      &queue.base),
                 QS_OK);
    cr_assert_str_eq(fake.calls, "copy(3) ( recv(1,u8,0) send(5,u8,stream,3,4) recv(4,u8,2) "
                                 "send(2,u8,stream,0,10) ) ");
    cr_assert_eq(memcmp(recv + 1, send, 3), 0);
    cr_assert_eq(fake.depth, 0);
    cr_assert_eq(qs_comm_received_bytes(comm) - before, 5);
    qs_comm_destroy(comm);
    qs_comm_fini(&host);
}

/* One group, and so one launch, for all calls of a batch. */
Test(comm_nccl, a_batch_is_one_group)
{
    qs_comm host = fake_host(0, 2);
    qs_comm *comm = make_comm(&host);
    fake_queue queue = fake_queue_make();
    fake_stream = fake_native(&queue.base);
    char data[8] = {5, 6};
    const size_t sends[] = {0, 1}, comes[] = {0, 2}, at[] = {0, 1}, to[] = {0, 4};
    fake.polls = 3;
    fake_forget();
    cr_assert_eq(qs_comm_batch_begin(comm), QS_OK);
    for (int i = 0; i < 2; i++) {
        cr_assert_eq(qs_comm_all_to_all_v(comm, data, sends, at, data, comes, to, &queue.base),
                     QS_OK);
    }
    cr_assert_eq(qs_comm_batch_end(comm, QS_OK), QS_OK);
    cr_assert_str_eq(fake.calls, "( recv(2,u8,1) send(1,u8,stream,1,6) recv(2,u8,1) "
                                 "send(1,u8,stream,1,6) ) ");
    cr_assert_eq(fake.comm.polls_left, 0); /* seen through */
    fake_forget();
    cr_assert_eq(qs_comm_all_to_all_v(comm, data, sends, at, data, comes, to, &queue.base), QS_OK);
    cr_assert_str_eq(fake.calls, "( recv(2,u8,1) send(1,u8,stream,1,6) ) ");
    qs_comm_destroy(comm);
    qs_comm_fini(&host);
}

/* Whatever fails in it, and wherever: NCCL or the caller's own work between. */
Test(comm_nccl, a_batch_is_closed_after_a_failure_in_it)
{
    static const char *const calls[] = {"Send", "Recv", "GroupEnd", "GroupStart", ""};
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        qs_comm host = fake_host(0, 2);
        fake.failing = NULL;
        fake_aborts = 0;
        qs_comm *comm = make_comm(&host);
        fake_queue queue = fake_queue_make();
        char data[4] = {0};
        const size_t bytes[] = {0, 1}, at[] = {0, 1}, to[] = {0, 2};
        fake.failing = calls[i];
        fake.code = ncclSystemError;
        qs_status st = qs_comm_batch_begin(comm);
        if (st == QS_OK) {
            st = qs_comm_all_to_all_v(comm, data, bytes, at, data, bytes, to, &queue.base);
            cr_assert_eq(fake_aborts, 0); /* not within a group */
            st = calls[i][0] == '\0' ? QS_FAIL(QS_ERR_PEER, "nccl: of one's own") : st;
            st = qs_comm_batch_end(comm, st);
        }
        cr_assert_eq(st, QS_ERR_PEER, "%s", calls[i]);
        char name[32];
        snprintf(name, sizeof name, "nccl%s: ", calls[i]);
        assert_says(name);
        cr_assert_eq(fake.depth, 0, "%s", calls[i]);
        cr_assert_eq(fake_aborts, 1, "%s", calls[i]);
        qs_error_clear();
        qs_comm_destroy(comm);
        qs_comm_fini(&host);
    }
}

Test(comm_nccl, queues_of_the_cpu_and_small_calls_go_to_the_host)
{
    qs_comm host = fake_host(0, 2);
    qs_comm *comm = make_comm(&host);
    qs_queue *queue = NULL;
    cr_assert_eq(qs_queue_create(&queue, 1), QS_OK);
    char send[4] = {1, 2, 3, 4}, recv[8] = {0};
    const size_t bytes[] = {1, 3}, at[] = {0, 1};
    fake_forget();
    cr_assert_eq(qs_comm_all_gather(comm, send, recv, 4, queue), QS_OK);
    cr_assert_eq(qs_comm_all_to_all_v(comm, send, bytes, at, recv, bytes, at, queue), QS_OK);
    cr_assert_eq(qs_comm_barrier(comm), QS_OK);
    int64_t values[2] = {5, -6};
    cr_assert_eq(qs_comm_sum_i64(comm, values, 2), QS_OK);
    cr_assert_eq(values[0], 10);
    cr_assert_eq(qs_comm_agree(comm, QS_OK), QS_OK);
    cr_assert_str_eq(fake.calls, "host-gather(4) host-exchange(1,3) host-barrier ");
    qs_queue_destroy(queue);
    qs_comm_destroy(comm);
    qs_comm_fini(&host);
}

Test(comm_nccl, the_version_is_readable)
{
    char text[32];
    qs_comm_nccl_version(text, sizeof text);
    cr_assert_str_eq(text, "NCCL 2.28.9");
}

/* ---- what fails ---- */

Test(comm_nccl, a_lost_peer_is_exit_6_and_says_where_to_look)
{
    qs_comm host = fake_host(0, 2);
    qs_comm *comm = make_comm(&host);
    fake_queue queue = fake_queue_make();
    char recv[8];
    fake.failing = "AllGather";
    fake.code = ncclRemoteError;
    fake_forget();
    cr_assert_eq(qs_comm_all_gather(comm, recv, recv, 4, &queue.base), QS_ERR_PEER);
    cr_assert_eq(qs_exit_code(QS_ERR_PEER), 6);
    assert_says("ncclAllGather: remote process exited (socket closed); ");
    assert_says("NCCL_DEBUG=INFO");
    assert_says("NCCL_SOCKET_IFNAME");
    fake_forget(); /* nothing goes through it any more, and nobody waits for it in the end */
    fake.failing = NULL;
    cr_assert_eq(qs_comm_all_gather(comm, recv, recv, 4, &queue.base), QS_ERR_PEER);
    const size_t bytes[] = {1, 1}, at[] = {0, 1};
    cr_assert_eq(qs_comm_all_to_all_v(comm, recv, bytes, at, recv, bytes, at, &queue.base),
                 QS_ERR_PEER);
    cr_assert_eq(qs_comm_nccl_check(comm), QS_ERR_PEER);
    qs_comm_destroy(comm);
    cr_assert_str_eq(fake.calls, "");
    cr_assert_eq(fake_aborts, 1);
    qs_comm_fini(&host);
}

/* What the other one has on the GPU may wait for the same peer, and memory is freed before it is
 * destroyed. */
Test(comm_nccl, a_lost_peer_is_lost_to_all_communicators_of_the_device)
{
    qs_comm host = fake_host(0, 2), another = fake_host(1, 3);
    qs_comm *comm = make_comm(&host), *other = make_comm(&another);
    fake_queue queue = fake_queue_make();
    char recv[12];
    cr_assert_eq(qs_comm_all_gather(other, recv, recv, 4, &queue.base), QS_OK);
    fake.failing = "AllGather";
    fake.code = ncclRemoteError;
    cr_assert_eq(qs_comm_all_gather(comm, recv, recv, 4, &queue.base), QS_ERR_PEER);
    assert_says("ncclAllGather: remote process exited");
    cr_assert_eq(fake_aborts, 2);
    fake_forget();
    fake.failing = NULL;
    cr_assert_eq(qs_comm_all_gather(other, recv, recv, 4, &queue.base), QS_ERR_PEER);
    qs_comm_destroy(comm);
    qs_comm_destroy(other);
    cr_assert_str_eq(fake.calls, "");
    cr_assert_eq(fake_aborts, 2);
    qs_comm_fini(&host);
    qs_comm_fini(&another);
}

/* The same where the loss is found while the host waits. */
Test(comm_nccl, a_watch_that_finds_a_loss_ends_all_communicators_of_the_device)
{
    qs_comm host = fake_host(0, 2), another = fake_host(1, 3);
    qs_comm *comm = make_comm(&host), *other = make_comm(&another);
    fake.comm.state = ncclRemoteError;
    cr_assert_eq(fake_device.watches[1].watch(fake_device.watches[1].ctx), QS_ERR_PEER);
    cr_assert_eq(fake_aborts, 2);
    qs_comm_destroy(other);
    qs_comm_destroy(comm);
    cr_assert_eq(fake_aborts, 2);
    qs_comm_fini(&host);
    qs_comm_fini(&another);
}

/* The same where the loss is found by the next call: what is freed first would wait for kernels
 * that are ended only when the communicators are destroyed. */
Test(comm_nccl, a_call_that_finds_a_loss_ends_all_communicators_of_the_device)
{
    for (int exchanged = 0; exchanged < 2; exchanged++) {
        qs_comm host = fake_host(0, 2), another = fake_host(1, 3);
        fake_aborts = 0;
        qs_comm *comm = make_comm(&host), *other = make_comm(&another);
        fake_queue queue = fake_queue_make();
        char data[8] = {0};
        const size_t bytes[] = {1, 1}, at[] = {0, 1};
        fake.comm.state = ncclRemoteError;
        cr_assert_eq(exchanged ? qs_comm_all_to_all_v(comm, data, bytes, at, data + 4, bytes, at,
                                                      &queue.base)
                               : qs_comm_all_gather(comm, data, data, 4, &queue.base),
                     QS_ERR_PEER);
        cr_assert_eq(fake_aborts, 2);
        assert_says("remote process exited");
        qs_error_clear();
        qs_comm_destroy(other);
        qs_comm_destroy(comm);
        cr_assert_eq(fake_aborts, 2);
        qs_comm_fini(&host);
        qs_comm_fini(&another);
    }
}

/* A kernel of one communicator may stand in a stream behind one of another that spins, and an abort
 * waits for its own kernels: one by one, the first would wait for ever and end the job. */
Test(comm_nccl, communicators_are_aborted_at_the_same_time, .timeout = 30)
{
    qs_comm host = fake_host(0, 2), another = fake_host(1, 3);
    qs_comm *comm = make_comm(&host), *other = make_comm(&another);
    fake_queue queue = fake_queue_make();
    char recv[8];
    fake_aborts_awaited = 2;
    fake.failing = "AllGather";
    fake.code = ncclRemoteError;
    cr_assert_eq(qs_comm_all_gather(comm, recv, recv, 4, &queue.base), QS_ERR_PEER);
    cr_assert_eq(fake_aborts, 2);
    qs_comm_destroy(comm);
    qs_comm_destroy(other);
    qs_comm_fini(&host);
    qs_comm_fini(&another);
}

/* A peer may not come to NCCL before it has got what this rank has sent it through the host. */
Test(comm_nccl, the_hosts_messages_move_on_while_nccl_is_waited_for)
{
    qs_comm host = fake_host(0, 2);
    qs_comm *comm = make_comm(&host);
    fake_queue queue = fake_queue_make();
    char recv[8];
    fake_moves = 0;
    fake.polls = 3;
    cr_assert_eq(qs_comm_all_gather(comm, recv, recv, 4, &queue.base), QS_OK);
    cr_assert_eq(fake_moves, 2); /* between three looks */
    cr_assert_eq(fake_device.watches[0].watch(fake_device.watches[0].ctx), QS_OK);
    cr_assert_eq(fake_moves, 3);
    qs_comm_destroy(comm);
    qs_comm_fini(&host);
}

Test(comm_nccl, each_kind_of_failure_has_its_status)
{
    static const struct {
        ncclResult_t code;
        qs_status status;
    } kinds[] = {
        {ncclUnhandledCudaError, QS_ERR_DEVICE}, {ncclSystemError, QS_ERR_PEER},
        {ncclInternalError, QS_ERR_ENVIRONMENT}, {ncclInvalidArgument, QS_ERR_BUG},
        {ncclInvalidUsage, QS_ERR_ENVIRONMENT},  {ncclRemoteError, QS_ERR_PEER},
    };
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        qs_comm host = fake_host(0, 2);
        fake.failing = NULL;
        qs_comm *comm = make_comm(&host);
        fake_queue queue = fake_queue_make();
        char recv[8];
        fake.failing = "AllGather";
        fake.code = kinds[i].code;
        cr_assert_eq(qs_comm_all_gather(comm, recv, recv, 4, &queue.base), kinds[i].status);
        qs_error_clear();
        qs_comm_destroy(comm);
        qs_comm_fini(&host);
    }
}

/* NCCL says "unhandled cuda error", and its words say which: no reason to leave this host out. */
Test(comm_nccl, a_gpu_without_room_is_exit_7)
{
    qs_comm host = fake_host(0, 2);
    qs_comm *comm = make_comm(&host);
    fake_queue queue = fake_queue_make();
    char recv[8];
    fake.failing = "AllGather";
    fake.code = ncclUnhandledCudaError;
    fake.detail = "Cuda failure 2 'out of memory'";
    cr_assert_eq(qs_comm_all_gather(comm, recv, recv, 4, &queue.base), QS_ERR_MEMORY);
    cr_assert_eq(qs_exit_code(QS_ERR_MEMORY), 7);
    assert_says("train.micro_batch");
    assert_says("NCCL_MAX_P2P_NCHANNELS");
    qs_comm_destroy(comm);
    qs_comm_fini(&host);
}

/* Unless the user has said how many. */
Test(comm_nccl, channels_between_pairs_are_few)
{
    unsetenv("NCCL_MAX_P2P_NCHANNELS");
    for (int i = 0; i < 2; i++) {
        qs_comm host = fake_host(0, 2);
        qs_comm *comm = make_comm(&host);
        cr_assert_str_eq(getenv("NCCL_MAX_P2P_NCHANNELS"), i == 0 ? "8" : "16");
        setenv("NCCL_MAX_P2P_NCHANNELS", "16", 1);
        qs_comm_destroy(comm);
        qs_comm_fini(&host);
    }
}

Test(comm_nccl, a_group_is_closed_after_a_failure_in_it)
{
    static const char *const calls[] = {"Send", "Recv", "GroupEnd", "GroupStart"};
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        qs_comm host = fake_host(0, 3);
        fake.failing = NULL;
        qs_comm *comm = make_comm(&host);
        fake_queue queue = fake_queue_make();
        char data[16] = {0};
        const size_t bytes[] = {1, 2, 3}, at[] = {0, 1, 3};
        fake.failing = calls[i];
        fake.code = ncclSystemError;
        cr_assert_eq(qs_comm_all_to_all_v(comm, data, bytes, at, data + 8, bytes, at, &queue.base),
                     QS_ERR_PEER, "%s", calls[i]);
        char name[32];
        snprintf(name, sizeof name, "nccl%s: ", calls[i]);
        assert_says(name);
        cr_assert_eq(fake.depth, 0, "%s", calls[i]);
        qs_error_clear();
        qs_comm_destroy(comm);
        qs_comm_fini(&host);
    }
}

Test(comm_nccl, what_nccl_finds_in_the_background_ends_the_next_call)
{
    qs_comm host = fake_host(0, 2);
    qs_comm *comm = make_comm(&host);
    fake_queue queue = fake_queue_make();
    char recv[8];
    cr_assert_eq(qs_comm_all_gather(comm, recv, recv, 4, &queue.base), QS_OK);
    cr_assert_eq(qs_comm_nccl_check(comm), QS_OK);
    fake.comm.state = ncclRemoteError;
    fake_forget();
    cr_assert_eq(qs_comm_all_gather(comm, recv, recv, 4, &queue.base), QS_ERR_PEER);
    cr_assert_str_eq(fake.calls, "");
    assert_says("NCCL: remote process exited");
    qs_comm_destroy(comm);
    cr_assert_eq(fake_aborts, 1);
    qs_comm_fini(&host);
}

/* The call itself is taken; its failure shows while it is under way. */
Test(comm_nccl, a_failure_while_connecting_is_the_calls_own)
{
    qs_comm host = fake_host(0, 2);
    qs_comm *comm = make_comm(&host);
    fake_queue queue = fake_queue_make();
    char recv[8];
    fake.polls = 4;
    fake.async = ncclSystemError;
    cr_assert_eq(qs_comm_all_gather(comm, recv, recv, 4, &queue.base), QS_ERR_PEER);
    assert_says("ncclAllGather: ");
    qs_comm_destroy(comm);
    qs_comm_fini(&host);
}

Test(comm_nccl, a_peer_that_never_comes_is_lost_after_the_limit, .timeout = 20)
{
    setenv("QSHARD_NCCL_TIMEOUT", "0.3", 1);
    qs_comm host = fake_host(0, 2);
    qs_comm *comm = make_comm(&host);
    fake_queue queue = fake_queue_make();
    char recv[8];
    fake.polls = -1;
    const double start_s = qs_time_s();
    cr_assert_eq(qs_comm_all_gather(comm, recv, recv, 4, &queue.base), QS_ERR_PEER);
    const double took_s = qs_time_s() - start_s;
    cr_assert(took_s >= 0.3 && took_s < 5.0, "%g s", took_s);
    assert_says("ncclAllGather: rank 0 of 2 has waited 0.3 s");
    qs_comm_destroy(comm);
    cr_assert_eq(fake_aborts, 1);
    qs_comm_fini(&host);
}

/* Those it waits for cannot be asked to agree, and neither abort nor destroy is sure to return. */
Test(comm_nccl, a_start_that_takes_too_long_is_this_ranks_own_error, .timeout = 20)
{
    setenv("QSHARD_NCCL_TIMEOUT", "0.2", 1);
    qs_comm host = fake_host(1, 2);
    qs_comm *comm = NULL;
    fake.polls = -1;
    cr_assert_eq(qs_comm_nccl_create(&comm, &host, &fake_device), QS_ERR_PEER);
    cr_assert_null(comm);
    assert_says("ncclCommInitRankConfig: rank 1 of 2 has waited 0.2 s");
    cr_assert_not(qs_comm_agreed(&host));
    cr_assert_str_eq(fake.calls, "init(1/2,id,nonblocking) ");
    cr_assert_eq(fake_aborts, 0);
    qs_comm_fini(&host);
}

/* Connected, and nothing arrives. The others are aborted with it, so that memory can be freed. */
Test(comm_nccl, what_never_arrives_the_first_time_is_lost_after_the_limit, .timeout = 20)
{
    setenv("QSHARD_NCCL_TIMEOUT", "0.3", 1);
    qs_comm host = fake_host(0, 2), another = fake_host(1, 3);
    qs_comm *comm = make_comm(&host), *other = make_comm(&another);
    fake_queue queue = fake_queue_make();
    fake_stuck = true;
    const double start_s = qs_time_s();
    cr_assert_eq(qs_comm_nccl_wait(comm, &queue.base, "the first gather"), QS_ERR_PEER);
    const double took_s = qs_time_s() - start_s;
    cr_assert(took_s >= 0.3 && took_s < 5.0, "%g s", took_s);
    assert_says("NCCL has connected 2 ranks, but the first gather has not arrived on rank 0 in 0.3 "
                "s");
    assert_says("NCCL_P2P_DISABLE=1");
    cr_assert_eq(fake_aborts, 2);
    fake_stuck = false;
    qs_comm_destroy(comm);
    qs_comm_destroy(other);
    qs_comm_fini(&host);
    qs_comm_fini(&another);
}

/* Later waits are as long as a step is. */
Test(comm_nccl, the_limit_is_for_the_first_time_alone, .timeout = 20)
{
    setenv("QSHARD_NCCL_TIMEOUT", "0.05", 1);
    qs_comm host = fake_host(0, 2);
    qs_comm *comm = make_comm(&host);
    fake_queue queue = fake_queue_make();
    cr_assert_eq(qs_comm_nccl_wait(comm, &queue.base, "the first gather"), QS_OK);
    usleep(100000);
    cr_assert_eq(fake_device.watches[0].watch(fake_device.watches[0].ctx), QS_OK);
    qs_comm_destroy(comm);
    cr_assert_eq(fake_aborts, 0);
    qs_comm_fini(&host);
}

Test(comm_nccl, a_limit_that_is_no_time_is_refused)
{
    static const char *const texts[] = {"abc", "0", "-1", "5 s", "nan", "inf"};
    qs_comm host = fake_host(0, 2);
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        setenv("QSHARD_NCCL_TIMEOUT", texts[i], 1);
        qs_comm *comm = NULL;
        cr_assert_eq(qs_comm_nccl_create(&comm, &host, &fake_device), QS_ERR_CONFIG_VALUE, "%s",
                     texts[i]);
        assert_says("QSHARD_NCCL_TIMEOUT");
        qs_error_clear();
    }
    cr_assert_str_eq(fake.calls, "");
    qs_comm_fini(&host);
}

Test(comm_nccl, memory_of_the_cpu_is_refused)
{
    qs_comm host = fake_host(0, 2);
    qs_comm *comm = NULL;
    cr_assert_eq(qs_comm_nccl_create(&comm, &host, qs_device_cpu()), QS_ERR_BUG);
    qs_comm_fini(&host);
}

/* Nothing has failed: what was to be done is done, and an abort that hangs would say otherwise. */
Test(comm_nccl, a_farewell_that_hangs_is_cut_short, .timeout = 20)
{
    setenv("QSHARD_NCCL_TIMEOUT", "0.2", 1);
    qs_comm host = fake_host(0, 2);
    qs_comm *comm = make_comm(&host);
    fake.polls = -1;
    fake_forget();
    qs_comm_destroy(comm);
    cr_assert_str_eq(fake.calls, "finalize ");
    cr_assert_eq(fake_aborts, 0);
    qs_comm_fini(&host);
}

/* 5 s, then the job ends with the code of the first failure. */
Test(comm_nccl, an_abort_that_hangs_ends_the_job, .exit_code = 6, .timeout = 30)
{
    qs_comm host = fake_host(0, 2);
    qs_comm *comm = make_comm(&host);
    fake_queue queue = fake_queue_make();
    char recv[8];
    fake.failing = "AllGather";
    fake.code = ncclRemoteError;
    fake_abort_hangs = true;
    (void)qs_comm_all_gather(comm, recv, recv, 4, &queue.base);
    qs_comm_destroy(comm);
    _exit(0);
}

Test(comm_nccl, abort_is_the_hosts, .exit_code = 4)
{
    qs_comm host = fake_host(0, 2);
    qs_comm *comm = make_comm(&host);
    (void)QS_FAIL(QS_ERR_IO, "disk");
    qs_comm_abort(comm, QS_ERR_IO);
}

/* ---- ranks that differ ---- */

typedef struct {
    qs_comm *host;
    const char *failing;
    ncclResult_t code;
    int version;
    qs_status status;
    bool agreed;
    char text[1024];
} member;

static void *create_as_member(void *arg)
{
    member *m = arg;
    fake.failing = m->failing;
    fake.code = m->code;
    fake.version = m->version;
    qs_comm *comm = NULL;
    m->status = qs_comm_nccl_create(&comm, m->host, &fake_device);
    m->agreed = qs_comm_agreed(m->host);
    snprintf(m->text, sizeof m->text, "%s", qs_error_text());
    qs_comm_destroy(comm);
    qs_comm_destroy(m->host);
    return NULL;
}

static void create_in_threads(member members[3])
{
    qs_comm *hosts[3];
    pthread_t threads[3];
    cr_assert_eq(qs_comm_threads_create(hosts, 3), QS_OK);
    for (int r = 0; r < 3; r++) {
        members[r].host = hosts[r];
        cr_assert_eq(pthread_create(&threads[r], NULL, create_as_member, &members[r]), 0);
    }
    for (int r = 0; r < 3; r++) {
        pthread_join(threads[r], NULL);
    }
}

Test(comm_nccl, a_start_that_fails_on_one_rank_fails_on_all, .timeout = 30)
{
    static const char *const calls[] = {"Init", "GetAsyncError"};
    for (size_t i = 0; i < 2; i++) {
        member members[3] = {{0}};
        members[2].failing = calls[i];
        members[2].code = ncclInvalidUsage;
        create_in_threads(members);
        for (int r = 0; r < 3; r++) {
            cr_assert_eq(members[r].status, QS_ERR_ENVIRONMENT, "rank %d: %d", r,
                         (int)members[r].status);
            cr_assert(members[r].agreed);
            cr_assert_not_null(strstr(members[r].text, "a GPU of its own"), "%s", members[r].text);
        }
    }
}

Test(comm_nccl, an_id_that_cannot_be_made_is_told_to_all, .timeout = 30)
{
    member members[3] = {{0}};
    members[0].failing = "GetUniqueId";
    members[0].code = ncclSystemError;
    create_in_threads(members);
    for (int r = 0; r < 3; r++) {
        cr_assert_eq(members[r].status, QS_ERR_PEER);
        cr_assert(members[r].agreed);
    }
}

Test(comm_nccl, different_libraries_are_refused_by_name, .timeout = 30)
{
    member members[3] = {{0}};
    members[1].version = 22703;
    create_in_threads(members);
    for (int r = 0; r < 3; r++) {
        cr_assert_eq(members[r].status, QS_ERR_DISAGREE);
        cr_assert(members[r].agreed);
        cr_assert_not_null(strstr(members[r].text, "NCCL 2.28.9"), "%s", members[r].text);
        cr_assert_not_null(strstr(members[r].text, "NCCL 2.27.3"), "%s", members[r].text);
    }
}
