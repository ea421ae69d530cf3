/* An SSE server with a known schedule: the truth that load testers are held against.
 *
 *   truth_server PORT TTFT_MS GAP_MS [CHAT]
 *
 * Answers every POST with max_tokens (max_completion_tokens) chunks of one token: the first TTFT_MS after the request
 * was read, then one every GAP_MS, each in a write of its own, then usage and [DONE]. GET /v1/models names one model.
 * On SIGTERM it prints how late its own writes were, as JSON: a run in which it was late itself proves nothing.
 * One thread, epoll, a heap of due times; Linux.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum { MAX_FD = 16384, REQUEST_BYTES = 1 << 20, LATE_BINS = 100000 };

typedef struct {
    char *request;
    size_t have;
    int left, total, is_chat, prompt, position; /* position: in the heap, -1 outside */
    int64_t due_ns;
} Stream;

static Stream streams[MAX_FD];
static int heap[MAX_FD], heap_size;
static int64_t ttft_ns, gap_ns, late_total_ns, num_writes;
static int64_t late_bins[LATE_BINS]; /* of 10 us */
static volatile sig_atomic_t is_ended;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void put(int place, int fd) { heap[place] = fd; streams[fd].position = place; }

static void sift_up(int place) {
    int fd = heap[place];
    while (place > 0 && streams[heap[(place - 1) / 2]].due_ns > streams[fd].due_ns) {
        put(place, heap[(place - 1) / 2]);
        place = (place - 1) / 2;
    }
    put(place, fd);
}

static void sift_down(int place) {
    int fd = heap[place];
    for (;;) {
        int child = 2 * place + 1;
        if (child >= heap_size) break;
        if (child + 1 < heap_size && streams[heap[child + 1]].due_ns < streams[heap[child]].due_ns) child++;
        if (streams[heap[child]].due_ns >= streams[fd].due_ns) break;
        put(place, heap[child]);
        place = child;
    }
    put(place, fd);
}

static void schedule(int fd) {
    heap[heap_size] = fd;
    sift_up(heap_size++);
}

static void unschedule(int fd) {
    int place = streams[fd].position;
    if (place < 0) return;
    streams[fd].position = -1;
    if (--heap_size == place) return;
    int moved = heap[heap_size];
    put(place, moved);
    sift_up(place);
    sift_down(streams[moved].position);
}

static void drop(int fd) {
    unschedule(fd);
    free(streams[fd].request);
    memset(&streams[fd], 0, sizeof streams[fd]);
    close(fd);
}

static int chunked(char *out, const char *data, int size) {
    int head = sprintf(out, "%x\r\n", size);
    memcpy(out + head, data, size);
    memcpy(out + head + size, "\r\n", 2);
    return head + size + 2;
}

static int token(char *out, const Stream *s) {
    char data[1024];
    const char *reason = s->left == 1 ? "\"length\"" : "null";
    int size = s->is_chat
        ? sprintf(data, "data: {\"id\":\"chatcmpl-0123456789abcdef0123456789abcdef\",\"object\":\"chat.completion.chunk\","
                  "\"created\":1700000000,\"model\":\"truth\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" word\"},"
                  "\"logprobs\":null,\"finish_reason\":%s}]}\n\n", reason)
        : sprintf(data, "data: {\"id\":\"cmpl-0123456789abcdef0123456789abcdef\",\"object\":\"text_completion\",\"created\":"
                  "1700000000,\"model\":\"truth\",\"choices\":[{\"index\":0,\"text\":\" word\",\"logprobs\":null,"
                  "\"finish_reason\":%s,\"stop_reason\":null}],\"usage\":null}\n\n", reason);
    return chunked(out, data, size);
}

static void write_token(int fd) {
    static const char head[] = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
                               "Transfer-Encoding: chunked\r\n\r\n";
    char out[4096];
    Stream *s = &streams[fd];
    int size = 0;
    if (s->left == s->total) {
        memcpy(out, head, sizeof head - 1);
        size = sizeof head - 1;
    }
    size += token(out + size, s);
    if (s->left == 1) {
        char data[512];
        int n = sprintf(data, "data: {\"id\":\"x\",\"object\":\"%s\",\"created\":1700000000,\"model\":\"truth\",\"choices\":[],"
                        "\"usage\":{\"prompt_tokens\":%d,\"total_tokens\":%d,\"completion_tokens\":%d}}\n\n",
                        s->is_chat ? "chat.completion.chunk" : "text_completion", s->prompt, s->prompt + s->total, s->total);
        size += chunked(out + size, data, n);
        size += chunked(out + size, "data: [DONE]\n\n", 14);
        memcpy(out + size, "0\r\n\r\n", 5);
        size += 5;
    }
    int64_t late_ns = now_ns() - s->due_ns;
    late_total_ns += late_ns;
    num_writes++;
    int64_t bin = late_ns / 10000;
    late_bins[bin < 0 ? 0 : bin >= LATE_BINS ? LATE_BINS - 1 : bin]++;
    if (write(fd, out, size) != size) { drop(fd); return; }
    if (--s->left) {
        s->due_ns += gap_ns;
        schedule(fd);
    }
}

static int number_after(const char *text, const char *key) {
    const char *found = strstr(text, key);
    if (!found) return 0;
    found += strlen(key);
    while (*found == ' ' || *found == ':' || *found == '"') found++;
    return atoi(found);
}

static void answer(int fd, const char *body) {
    Stream *s = &streams[fd];
    static const char models[] = "{\"object\":\"list\",\"data\":[{\"id\":\"truth\",\"object\":\"model\",\"max_model_len\":131072}]}";
    if (!strncmp(s->request, "POST", 4) && !strncmp(s->request + 5, "/v1/", 4)) {
        int tokens = number_after(body, "\"max_completion_tokens\"");
        if (!tokens) tokens = number_after(body, "\"max_tokens\"");
        s->total = s->left = tokens > 0 ? tokens : 16;
        s->is_chat = strstr(s->request, "/chat/") != NULL && strstr(s->request, "/chat/") < body;
        s->prompt = 1; /* token ids are counted; a text is one token */
        const char *ids = strstr(body, "\"prompt\":[");
        for (const char *c = ids; c && *c && *c != ']'; c++) s->prompt += *c == ',' && c > ids + 9;
        s->due_ns = now_ns() + ttft_ns;
        schedule(fd);
        return;
    }
    char out[512];
    int is_models = !strncmp(s->request + 4, "/v1/models", 10);
    const char *text = is_models ? models : "{}";
    int size = sprintf(out, "HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                       is_models || !strncmp(s->request + 4, "/health", 7) ? "200 OK" : "404 Not Found", strlen(text), text);
    if (write(fd, out, size) != size) drop(fd);
}

static void read_request(int fd) {
    Stream *s = &streams[fd];
    if (!s->request) s->request = malloc(REQUEST_BYTES + 1);
    ssize_t n = read(fd, s->request + s->have, REQUEST_BYTES - s->have);
    if (n <= 0) {
        if (n == 0 || errno != EAGAIN) drop(fd);
        return;
    }
    s->have += n;
    s->request[s->have] = 0;
    char *end = strstr(s->request, "\r\n\r\n");
    if (!end) return;
    char *length = strcasestr(s->request, "content-length:");
    size_t need = end + 4 - s->request + (length && length < end ? atoi(length + 15) : 0);
    if (s->have < need) return;
    s->have = 0;
    answer(fd, end + 4);
}

static void on_signal(int number) { (void)number; is_ended = 1; }

int main(int argc, char **argv) {
    if (argc < 4) { fprintf(stderr, "usage: truth_server PORT TTFT_MS GAP_MS\n"); return 2; }
    ttft_ns = (int64_t)(atof(argv[2]) * 1e6);
    gap_ns = (int64_t)(atof(argv[3]) * 1e6);
    struct rlimit files = {MAX_FD, MAX_FD};
    setrlimit(RLIMIT_NOFILE, &files);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGTERM, on_signal);
    signal(SIGINT, on_signal);
    int server = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1]))};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(server, (struct sockaddr *)&address, sizeof address) || listen(server, 4096)) { perror("listen"); return 1; }
    socklen_t size = sizeof address;
    getsockname(server, (struct sockaddr *)&address, &size);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    int poll = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = server}, events[1024];
    epoll_ctl(poll, EPOLL_CTL_ADD, server, &event);
    while (!is_ended) {
        struct timespec wait = {.tv_sec = 1};
        if (heap_size) {
            int64_t left_ns = streams[heap[0]].due_ns - now_ns();
            if (left_ns < 0) left_ns = 0;
            wait = (struct timespec){.tv_sec = left_ns / 1000000000, .tv_nsec = left_ns % 1000000000};
        }
        int n = epoll_pwait2(poll, events, 1024, &wait, NULL);
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd;
            if (fd != server) { read_request(fd); continue; }
            for (int client; (client = accept4(server, NULL, NULL, SOCK_NONBLOCK)) >= 0;) {
                if (client >= MAX_FD) { close(client); continue; }
                setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
                memset(&streams[client], 0, sizeof streams[client]);
                streams[client].position = -1;
                event = (struct epoll_event){.events = EPOLLIN, .data.fd = client};
                epoll_ctl(poll, EPOLL_CTL_ADD, client, &event);
            }
        }
        int64_t at_ns = now_ns();
        for (int writes = 0; heap_size && streams[heap[0]].due_ns <= at_ns && writes < 4096; writes++) {
            int fd = heap[0];
            unschedule(fd);
            write_token(fd);
        }
    }
    int64_t seen = 0, p50 = -1, p99 = -1;
    for (int i = 0; i < LATE_BINS && num_writes; i++) {
        seen += late_bins[i];
        if (p50 < 0 && seen * 2 >= num_writes) p50 = i;
        if (p99 < 0 && seen * 100 >= num_writes * 99) p99 = i;
    }
    printf("{\"writes\": %lld, \"late_mean_ms\": %.4f, \"late_p50_ms\": %.2f, \"late_p99_ms\": %.2f}\n", (long long)num_writes,
           num_writes ? late_total_ns / 1e6 / num_writes : 0.0, p50 * 0.01, p99 * 0.01);
    return 0;
}
