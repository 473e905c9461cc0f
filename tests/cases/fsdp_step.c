/* A step without a model, over MPI: units, embedding rows and gradients of the fixture go through
 * the collectives, are checked on every rank, and rank 0 prints hashes that must not depend on the
 * number of ranks. Started by test_fsdp. */
#include "../fsdp_fixture.h"
#include "base/mem.h"
#include "fsdp/lora_gather.h"
#include "store/hash.h"

enum { SLOTS = 11, GROUP = 2, LORA_CHUNKS = 7 };

static qs_status units_and_rows(qs_fsdp *f, int rank)
{
    int32_t tokens[40];
    float rows[40 * FX_HIDDEN];
    int64_t count = rank % 2 == 1 ? 0 : 40;
    for (int i = 0; i < 40; i++) {
        tokens[i] = (int32_t)((i * 7 + rank) % FX_VOCAB);
    }
    QS_TRY(qs_fsdp_embed(f, tokens, count, rows));
    QS_TRY(fx_check_rows(tokens, count, rows));
    QS_TRY(fx_announce_all(f));
    for (int u = 0; u < FX_UNITS; u++) {
        qs_unit_view view;
        QS_TRY(qs_fsdp_acquire(f, u, &view));
        QS_TRY(fx_check_view(&view, u));
        QS_TRY(qs_fsdp_release(f, u));
    }
    return QS_OK;
}

static qs_status gradients(qs_fsdp *f, qs_grads *grads, qs_comm *comm, qs_queue *queue,
                           const qs_lora_layout *layout)
{
    float *shard = NULL, *full = NULL;
    double norm = 0;
    QS_TRY(fx_backward(grads, layout, qs_comm_rank(comm), qs_comm_nranks(comm), SLOTS, GROUP));
    QS_TRY(units_and_rows(f, qs_comm_rank(comm))); /* while the last reductions are under way */
    QS_TRY(qs_grads_finish(grads, &shard));
    QS_TRY(qs_grads_norm(grads, shard, &norm));
    QS_TRY(QS_ALLOC(&full, layout->n_layers * layout->per_layer, QS_MEM_LORA));
    qs_status st = qs_lora_gather(layout, &(qs_levels){.world = comm}, queue,
                                  (size_t[FX_EXCHANGE]){0}, shard, full);
    if (st == QS_OK && qs_comm_rank(comm) == 0) {
        size_t bytes = (size_t)(layout->n_layers * layout->per_layer) * sizeof *full;
        printf("gradient %016llx\nnorm %a\n", (unsigned long long)qs_xxh3_64(full, bytes), norm);
    }
    qs_mem_free(full);
    return st;
}

static qs_status step(qs_comm *comm)
{
    qs_status st = QS_OK;
    qs_queue *queue = NULL;
    qs_fsdp *f = NULL;
    qs_grads *grads = NULL;
    qs_lora_layout layout = fx_lora(3, LORA_CHUNKS);
    fx_base base;
    fx_base_make(&base, QS_BF16);
    const qs_fsdp_options options = fx_options(40);
    QS_GOTO(qs_queue_create(&queue, 1));
    QS_GOTO(qs_fsdp_create_from(&f, &base.index, comm, queue, &options, fx_fill, &base));
    QS_GOTO(qs_grads_create(&grads, &layout, qs_ops_cpu(), &(qs_levels){.world = comm}, queue,
                            SLOTS, GROUP));
    qs_grads_attach(grads, f);
    for (int i = 0; i < 2; i++) {
        QS_GOTO(gradients(f, grads, comm, queue, &layout));
    }
done:
    qs_grads_destroy(grads);
    qs_fsdp_destroy(f);
    qs_queue_destroy(queue);
    return st;
}

int main(int argc, char **argv)
{
    qs_comm *comm = NULL;
    qs_status st = qs_comm_mpi_create(&comm, &argc, &argv);
    if (st == QS_OK) {
        st = step(comm);
    }
    qs_error_print(st);
    if (st != QS_OK && comm != NULL) {
        qs_comm_abort(comm, st);
    }
    qs_comm_destroy(comm);
    return qs_exit_code(st);
}
