/* load: one thread that keeps many connections busy and measures the replies.
 *
 *     load --connect 127.0.0.1:8080 --file queries --connections 100 --seconds 5
 *     load --connect 127.0.0.1:8080 --template 'INDEX|p-%c-%d|\n' --connections 16 --depth 1000
 *     load --connect … --file queries --rate 20000 --stream --template … --rate 5000
 *
 * What is sent. A stream is a source of messages and the connections that send them. A source is a
 * file of messages, one a line (with --escaped without its line end, but with \n, \r and \\ as in C),
 * cycled, each connection beginning at another place, with --random in an order drawn once; or a
 * template, escaped too, in which
 *     %c  is the connection's number, 4 digits       %d  this connection's next number, 8 digits
 *     %r  a random number below --range, 6 digits    %m  as %d, modulo --modulo
 * With --other a stream has a second template: for each --every'th message of a connection, or with
 * --turns for --modulo messages after as many of the first, and so on. Which of the two a message was
 * follows from its number alone, so that a check afterwards knows what each reply answered.
 * Numbers have a fixed width so that protocols with lengths in front can be written as templates.
 * Messages of a file go out as they lie in memory: nothing is copied or made per message.
 *
 * When it is sent. Closed loop (the default): each connection sends `depth` messages at once, waits for
 * all their replies, sends the next. Open loop (--rate, messages a second over the whole stream): each
 * message has an intended time and goes out then, however many are unanswered; its latency counts from
 * the *intended* time, so a stall of the server is charged with every message that it kept waiting
 * ("coordinated omission" is not left out). The open loop spins, to be in time.
 *
 * What is read. A reply is one line: OK or FAIL if it is the one or the other of --replies, else ERROR.
 *
 * How it ends. After --warmup and --seconds it stops sending and takes up to 10 s for the replies still
 * due; with --once it sends each message of the file once; with --until-killed it goes on after the
 * measured time until the server is gone, and then tells how many replies each connection had.
 *
 * Output: one JSON object. `rate` counts replies within the measured time; `ok`, `fail` and `error` count
 * all. `busy` is the share of the time that this process had the CPU: near 1 in a closed loop, the
 * generator was the limit. Exit codes: 0, 1 if replies are missing or the server closed, 2 usage.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum {
    INBOX = 256 * 1024,  /* bytes of one read */
    PIECE = 64 * 1024,   /* bytes of made messages that wait for one connection, at most */
    EVENTS = 512,
    STREAMS = 4,
    REPLY = 8,           /* the longest OK or FAIL: compared as one word */
    MINOR = 5,           /* bits of a latency that its histogram keeps: 3 % */
    BUCKETS = 64 << MINOR,
};
#define GRACE 10e9

struct connection {
    struct stream *stream;
    int fd;
    bool blocked;             /* waits to be writable */
    bool in_error;            /* within a reply longer than REPLY */
    uint8_t tail_size;
    char tail[REPLY];         /* a reply's first bytes, when a read cut it */
    const char *out;          /* what is being sent */
    size_t out_size;
    char *made;               /* where a template's messages are made */
    uint64_t cursor;          /* the next message of the file */
    uint64_t number;          /* of this connection in its stream */
    uint64_t allowed;         /* messages that it may have sent by now, */
    uint64_t sent;            /* has sent or is sending, */
    uint64_t answered;        /* and has replies to */
    uint64_t limit;           /* messages in all */
    uint64_t batch_began;     /* closed loop: when these messages went out, ns */
};

struct stream {
    const char *file;
    char *template, *other;
    bool escaped, random, once, turns;
    uint64_t count, depth, range, modulo, every;
    double rate;
    struct reply { uint64_t word, mask; size_t size; } ok, fail;

    char *bytes;              /* the file's messages, in the order of sending, */
    uint64_t *offsets;        /* and where each begins; one more for the end */
    uint64_t messages;
    size_t template_size;     /* of the longest message that it can make */

    struct connection *connections;
    uint64_t width;           /* how many */
    uint64_t due;             /* open loop: messages whose time has come */

    uint64_t ok_count, fail_count, error_count, within;
    uint64_t histogram[BUCKETS], longest;
    double latency_sum;
    char first_error[80];
};

static struct sockaddr_in server;
static double warmup = 0.5, seconds = 2;
static bool until_killed, want_acked;
static uint64_t seed = 1;
static struct stream streams[STREAMS];
static int nstreams = 1, poller;
static uint64_t begin, end, last_reply;     /* of the measured time; ns */
static uint64_t open_connections, closed_early, unanswered, remaining;
static bool ending;
static char inbox[REPLY + INBOX + REPLY];

#define die(code, ...) (fprintf(stderr, __VA_ARGS__), fputc('\n', stderr), exit(code))

static void *room(size_t count, size_t size)
{
    void *p = calloc(count ? count : 1, size);
    if (p == NULL)
        die(2, "no memory for %zu × %zu bytes", count, size);
    return p;
}

static uint64_t clock_ns(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t draw(void)  /* xorshift64* */
{
    seed ^= seed >> 12;
    seed ^= seed << 25;
    seed ^= seed >> 27;
    return seed * 0x2545F4914F6CDD1Du;
}

/* --- latencies: buckets whose width grows with the value ---------------------------------------- */

static unsigned bucket_of(uint64_t ns)
{
    if (ns < 1u << MINOR)
        return (unsigned)ns;
    unsigned shift = 63 - MINOR - (unsigned)__builtin_clzll(ns);
    return ((shift + 1) << MINOR) + (unsigned)((ns >> shift) & ((1u << MINOR) - 1));
}

static double bucket_middle(unsigned bucket)
{
    unsigned shift = bucket >> MINOR, low = bucket & ((1u << MINOR) - 1);
    return shift == 0 ? low : ((double)(low + (1u << MINOR)) + 0.5) * (double)(1ull << (shift - 1));
}

static void record(struct stream *s, uint64_t ns, uint64_t times)
{
    s->histogram[bucket_of(ns)] += times;
    s->latency_sum += (double)ns * (double)times;
    s->within += times;
    if (ns > s->longest)
        s->longest = ns;
}

static double percentile(const struct stream *s, double share)
{
    uint64_t wanted = (uint64_t)(share * (double)s->within), seen = 0;
    unsigned i = 0;
    while (i < BUCKETS - 1 && (seen += s->histogram[i]) <= wanted)
        i++;
    return bucket_middle(i) < (double)s->longest ? bucket_middle(i) : (double)s->longest;
}

/* --- sources ------------------------------------------------------------------------------------ */

/* Resolve \n, \r and \\ in place; the size left. */
static size_t unescape(char *text, size_t size)
{
    char *to = text;
    for (const char *p = text; p < text + size; p++)
        if (*p == '\\' && p + 1 < text + size && strchr("nr\\", p[1]))
            p++, *to++ = *p == 'n' ? '\n' : *p == 'r' ? '\r' : '\\';
        else
            *to++ = *p;
    return (size_t)(to - text);
}

static void read_messages(struct stream *s)
{
    FILE *file = fopen(s->file, "re");
    struct stat st;
    if (file == NULL || fstat(fileno(file), &st) != 0)
        die(2, "%s: %s", s->file, strerror(errno));
    char *line = NULL, *data = room((size_t)st.st_size + 1, 1);
    size_t line_room = 0, size = 0, most = 0;
    uint64_t *starts = NULL;
    for (ssize_t n; (n = getline(&line, &line_room, file)) > 0; s->messages++) {
        if (s->messages + 1 >= most && !(starts = realloc(starts, (most = 2 * most + 1024) * sizeof *starts)))
            die(2, "no memory for the messages of %s", s->file);
        size_t length = s->escaped ? unescape(line, (size_t)n - 1) : (size_t)n;
        starts[s->messages] = size;
        memcpy(data + size, line, length);
        starts[s->messages + 1] = size += length;
    }
    fclose(file);
    free(line);
    if (s->messages == 0)
        die(2, "%s: empty", s->file);
    s->bytes = data;
    s->offsets = starts;
    if (!s->random)
        return;
    uint64_t *order = room(s->messages, sizeof *order);
    for (uint64_t i = 0, j; i < s->messages; i++) {
        j = draw() % (i + 1);
        order[i] = order[j];
        order[j] = i;
    }
    s->bytes = room(size, 1);
    s->offsets = room(s->messages + 1, sizeof *s->offsets);
    for (uint64_t i = 0; i < s->messages; i++) {
        size_t length = starts[order[i] + 1] - starts[order[i]];
        memcpy(s->bytes + s->offsets[i], data + starts[order[i]], length);
        s->offsets[i + 1] = s->offsets[i] + length;
    }
    free(order), free(starts), free(data);
}

static char *put_number(char *p, uint64_t value, int digits)
{
    for (int i = digits; i-- > 0; value /= 10)
        p[i] = (char)('0' + value % 10);
    return p + digits;
}

/* One message of a template at p; its end. */
static char *make_message(const struct stream *s, const struct connection *c, char *p)
{
    bool other = s->other && (s->turns ? c->sent / s->modulo % 2 : c->sent % s->every == s->every - 1);
    for (const char *t = other ? s->other : s->template; *t; t++) {
        if (*t == '%' && t[1] == 'c')
            t++, p = put_number(p, c->number, 4);
        else if (*t == '%' && t[1] == 'd')
            t++, p = put_number(p, c->sent, 8);
        else if (*t == '%' && t[1] == 'm')
            t++, p = put_number(p, c->sent % s->modulo, 8);
        else if (*t == '%' && t[1] == 'r')
            t++, p = put_number(p, draw() % s->range, 6);
        else
            *p++ = *t;
    }
    return p;
}

/* The next piece of what this connection may send, into `out`. */
static void fill(struct connection *c)
{
    struct stream *s = c->stream;
    uint64_t wanted = c->allowed - c->sent;
    if (s->file) {
        wanted = wanted < s->messages - c->cursor ? wanted : s->messages - c->cursor;
        c->out = s->bytes + s->offsets[c->cursor];
        c->out_size = s->offsets[c->cursor + wanted] - s->offsets[c->cursor];
        c->cursor = (c->cursor + wanted) % s->messages;
        c->sent += wanted;
        return;
    }
    uint64_t fit = PIECE / s->template_size ? PIECE / s->template_size : 1;
    if (c->made == NULL)
        c->made = room((fit < s->depth || s->rate > 0 ? fit : s->depth) * s->template_size, 1);
    char *p = c->made;
    for (uint64_t n = wanted < fit ? wanted : fit; n > 0; n--, c->sent++)
        p = make_message(s, c, p);
    c->out = c->made;
    c->out_size = (size_t)(p - c->made);
}

/* --- connections -------------------------------------------------------------------------------- */

static void watch(struct connection *c, int operation, uint32_t what)
{
    epoll_ctl(poller, operation, c->fd, &(struct epoll_event){.events = what, .data.ptr = c});
}

static void lose(struct connection *c)
{
    close(c->fd);
    c->fd = -1;
    open_connections--;
    unanswered -= c->allowed - c->answered;
    closed_early += !until_killed;
}

static void transmit(struct connection *c)
{
    for (;;) {
        if (c->out_size == 0) {
            if (c->sent == c->allowed)
                break;
            fill(c);
        }
        ssize_t n = send(c->fd, c->out, c->out_size, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN) {
            if (!c->blocked)
                watch(c, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
            c->blocked = true;
            return;
        }
        if (n < 0)
            return;  /* the connection is gone: what is still there will be read, and then its end */
        c->out += n;
        c->out_size -= (size_t)n;
    }
    if (c->blocked)
        watch(c, EPOLL_CTL_MOD, EPOLLIN);
    c->blocked = false;
}

static void allow(struct connection *c, uint64_t messages)
{
    if (messages > c->limit - c->allowed)
        messages = c->limit - c->allowed;
    if (c->fd < 0 || messages == 0)
        return;
    c->allowed += messages;
    remaining -= messages;
    unanswered += messages;
    transmit(c);
}

static void next_batch(struct connection *c, uint64_t now)
{
    c->batch_began = now;
    allow(c, c->stream->depth);
}

/* How many replies end within [p, stop), behind which lie REPLY zero bytes; a cut one goes to the tail. */
static uint64_t count_replies(struct connection *c, const char *p, const char *stop)
{
    struct stream *s = c->stream;
    struct reply is_ok = s->ok, is_fail = s->fail;
    uint64_t word, ok = 0, fail = 0, error = 0;
    while (p < stop) {
        memcpy(&word, p, 8);
        if (!c->in_error && (word & is_ok.mask) == is_ok.word) {
            ok++;
            p += is_ok.size;
        } else if (!c->in_error && (word & is_fail.mask) == is_fail.word) {
            fail++;
            p += is_fail.size;
        } else {
            size_t left = (size_t)(stop - p);
            const char *line_end = memchr(p, '\n', left);
            if (line_end == NULL && left < REPLY && !c->in_error) {
                memcpy(c->tail, p, left);
                c->tail_size = (uint8_t)left;
                break;
            }
            if (s->first_error[0] == 0)
                for (size_t i = 0; i < left && i < sizeof s->first_error - 1 && p[i] > 0x1f; i++)
                    s->first_error[i] = p[i] == '"' || p[i] == '\\' ? '?' : p[i];
            c->in_error = line_end == NULL;
            error += line_end != NULL;
            p = line_end ? line_end + 1 : stop;
        }
    }
    s->ok_count += ok;
    s->fail_count += fail;
    s->error_count += error;
    return ok + fail + error;
}

static void receive(struct connection *c)
{
    struct stream *s = c->stream;
    ssize_t n;
    do {
        size_t before = c->tail_size;
        memcpy(inbox, c->tail, before);
        n = recv(c->fd, inbox + before, INBOX, 0);
        if (n <= 0) {
            if (n == 0 || errno != EAGAIN)
                lose(c);
            return;
        }
        uint64_t now = clock_ns(CLOCK_MONOTONIC);
        size_t size = before + (size_t)n;
        memset(inbox + size, 0, REPLY);
        c->tail_size = 0;
        uint64_t replies = count_replies(c, inbox, inbox + size);
        if (replies > c->allowed - c->answered)
            die(1, "more replies than messages; the last: %.20s", inbox);
        if (s->rate > 0) {
            for (uint64_t i = c->answered; i < c->answered + replies; i++) {
                double intended = (double)(i * s->width + c->number) / s->rate * 1e9;
                uint64_t at = begin - (uint64_t)(warmup * 1e9) + (uint64_t)intended;
                if (at >= begin && at < end)
                    record(s, now - at, 1);
            }
        } else if (now >= begin && now < end) {
            record(s, now - c->batch_began, replies);
        }
        c->answered += replies;
        unanswered -= replies;
        last_reply = now;
        if (s->rate <= 0 && c->answered == c->allowed && !ending)
            next_batch(c, now);
    } while (n == INBOX);
}

static void parse_address(const char *text)
{
    char host[64] = "";
    const char *colon = strrchr(text, ':');
    if (colon != NULL && colon - text < (long)sizeof host)
        memcpy(host, text, (size_t)(colon - text));
    if (inet_pton(AF_INET, host, &server.sin_addr) != 1)
        die(2, "--connect %s: write it as IPv4-ADDRESS:PORT", text);
    server.sin_family = AF_INET;
    server.sin_port = htons((uint16_t)atoi(colon + 1));
}

static int connect_to_server(void)
{
    int on = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&server, sizeof server) != 0)
        die(1, "cannot connect: %s", strerror(errno));
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    fcntl(fd, F_SETFL, O_NONBLOCK);
    return fd;
}

static void open_stream(struct stream *s)
{
    if ((s->file == NULL) == (s->template == NULL))
        die(2, "each stream has either --file or --template");
    if (s->file) {
        read_messages(s);
        if (s->once)
            s->count = s->messages;
    } else {
        char *both[] = {s->template, s->other};
        for (int i = 0; i < 2 && both[i]; i++) {
            both[i][unescape(both[i], strlen(both[i]))] = '\0';
            size_t most = strlen(both[i]) * 4 + 1;  /* "%d" becomes 8 digits */
            s->template_size = most > s->template_size ? most : s->template_size;
        }
    }
    s->connections = room(s->width, sizeof *s->connections);
    for (uint64_t i = 0; i < s->width; i++) {
        struct connection *c = &s->connections[i];
        c->stream = s;
        c->number = i;
        c->fd = connect_to_server();
        c->cursor = s->messages * i / s->width;
        c->limit = s->count ? s->count * (i + 1) / s->width - s->count * i / s->width : UINT64_MAX;
        remaining += c->limit;
        watch(c, EPOLL_CTL_ADD, EPOLLIN);
        open_connections++;
    }
}

/* --- the run ------------------------------------------------------------------------------------ */

static void run(void)
{
    bool spin = false, counted = true;
    for (int i = 0; i < nstreams; i++)
        spin |= streams[i].rate > 0, counted &= streams[i].count > 0;
    uint64_t start = last_reply = clock_ns(CLOCK_MONOTONIC);
    warmup = counted ? 0 : warmup;
    begin = start + (uint64_t)(warmup * 1e9);
    end = counted ? UINT64_MAX : begin + (uint64_t)(seconds * 1e9);
    for (int i = 0; i < nstreams; i++)
        for (uint64_t j = 0; j < streams[i].width && streams[i].rate <= 0; j++)
            next_batch(&streams[i].connections[j], clock_ns(CLOCK_MONOTONIC));

    while (open_connections > 0) {
        struct epoll_event events[EVENTS];
        int n = epoll_wait(poller, events, EVENTS, spin && !ending ? 0 : 10);
        if (n < 0 && errno != EINTR)
            die(2, "epoll_wait: %s", strerror(errno));
        for (int i = 0; i < n; i++) {
            struct connection *c = events[i].data.ptr;
            if (events[i].events & ~(uint32_t)EPOLLOUT)
                receive(c);
            if (events[i].events & EPOLLOUT && c->fd >= 0)
                transmit(c);
        }
        uint64_t now = clock_ns(CLOCK_MONOTONIC);
        if (counted ? unanswered == 0 && remaining == 0 : now >= end && !until_killed)
            ending = true;
        if (ending && (unanswered == 0 || now > last_reply + (uint64_t)GRACE))
            return;
        if (until_killed && now > end && now - end > (uint64_t)GRACE)
            die(1, "the server was to be killed, and lives");
        for (int i = 0; i < nstreams && !ending; i++) {
            struct stream *s = &streams[i];
            if (s->rate > 0)
                for (uint64_t due = (uint64_t)((double)(now - start) / 1e9 * s->rate); s->due < due; s->due++)
                    allow(&s->connections[s->due % s->width], 1);
        }
    }
}

static void report(double busy)
{
    printf("{\"busy\": %.3f, \"missing\": %lu, \"closed_early\": %lu, \"streams\": [",
           busy, unanswered, closed_early);
    for (int i = 0; i < nstreams; i++) {
        struct stream *s = &streams[i];
        double measured = end == UINT64_MAX ? (double)(last_reply - begin) / 1e9 : seconds;
        printf("%s{\"connections\": %lu, \"depth\": %lu, \"target_rate\": %.0f, \"seconds\": %.6f, \"replies\": %lu, "
               "\"rate\": %.1f, \"ok\": %lu, \"fail\": %lu, \"error\": %lu, \"first_error\": \"%s\", ",
               i ? ", " : "", s->width, s->depth, s->rate, measured, s->within,
               (double)s->within / (measured > 0 ? measured : 1e-9),
               s->ok_count, s->fail_count, s->error_count, s->first_error);
        printf("\"latency_us\": {\"mean\": %.2f, \"p50\": %.2f, \"p90\": %.2f, \"p99\": %.2f, \"p99.9\": %.2f, "
               "\"max\": %.2f}",
               s->within ? s->latency_sum / (double)s->within / 1e3 : 0, percentile(s, 0.5) / 1e3,
               percentile(s, 0.9) / 1e3, percentile(s, 0.99) / 1e3, percentile(s, 0.999) / 1e3,
               (double)s->longest / 1e3);
        if (want_acked) {
            fputs(", \"acked\": [", stdout);
            for (uint64_t j = 0; j < s->width; j++)
                printf("%s%lu", j ? ", " : "", s->connections[j].answered);
            fputc(']', stdout);
        }
        fputc('}', stdout);
    }
    puts("]}");
}

static double number(const char *option, const char *text, double least)
{
    char *rest;
    double value = strtod(text, &rest);
    if (rest == text || *rest || value < least)
        die(2, "%s: needs a number of at least %g", option, least);
    return value;
}

static struct reply parse_reply(const char *text, size_t size)
{
    if (size == 0 || size > REPLY)
        die(2, "--replies: write OK's and FAIL's as 'OK\\n,FAIL\\n', each at most %d bytes", REPLY);
    struct reply reply = {.mask = ~0ull >> (64 - 8 * size), .size = size};
    memcpy(&reply.word, text, size);
    return reply;
}

static void parse_replies(struct stream *s, char *text)
{
    size_t size = unescape(text, strlen(text));
    const char *comma = memchr(text, ',', size);
    size_t first = comma ? (size_t)(comma - text) : 0;
    s->ok = parse_reply(text, first);
    s->fail = parse_reply(text + first + 1, size - first - 1);
}

static void begin_stream(struct stream *s)
{
    s->width = s->depth = 1;
    s->range = 1000000;
    s->modulo = 1;
    s->every = 2;
    char replies[] = "OK\n,FAIL\n";
    parse_replies(s, replies);
}

int main(int count, char **words)
{
    struct stream *s = &streams[0];
    begin_stream(s);
    parse_address("127.0.0.1:8080");
    for (int i = 1; i < count; i++) {
        char *o = words[i], *v = i + 1 < count ? words[i + 1] : "";
        if (strcmp(o, "--escaped") == 0) s->escaped = true;
        else if (strcmp(o, "--random") == 0) s->random = true;
        else if (strcmp(o, "--once") == 0) s->once = true;
        else if (strcmp(o, "--turns") == 0) s->turns = true;
        else if (strcmp(o, "--until-killed") == 0) until_killed = true;
        else if (strcmp(o, "--acked") == 0) want_acked = true;
        else if (strcmp(o, "--stream") == 0 && nstreams < STREAMS) begin_stream(s = &streams[nstreams++]);
        else if (i++, strcmp(o, "--connect") == 0) parse_address(v);
        else if (strcmp(o, "--file") == 0) s->file = v;
        else if (strcmp(o, "--template") == 0) s->template = v;
        else if (strcmp(o, "--other") == 0) s->other = v;
        else if (strcmp(o, "--replies") == 0) parse_replies(s, v);
        else if (strcmp(o, "--connections") == 0) s->width = (uint64_t)number(o, v, 1);
        else if (strcmp(o, "--depth") == 0) s->depth = (uint64_t)number(o, v, 1);
        else if (strcmp(o, "--range") == 0) s->range = (uint64_t)number(o, v, 1);
        else if (strcmp(o, "--modulo") == 0) s->modulo = (uint64_t)number(o, v, 1);
        else if (strcmp(o, "--every") == 0) s->every = (uint64_t)number(o, v, 1);
        else if (strcmp(o, "--count") == 0) s->count = (uint64_t)number(o, v, 1);
        else if (strcmp(o, "--rate") == 0) s->rate = number(o, v, 1);
        else if (strcmp(o, "--seconds") == 0) seconds = number(o, v, 0.01);
        else if (strcmp(o, "--warmup") == 0) warmup = number(o, v, 0);
        else if (strcmp(o, "--seed") == 0) seed = (uint64_t)number(o, v, 1);
        else die(2, "%s: no such option; the head of load.c tells what there is", o);
    }

    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    poller = epoll_create1(EPOLL_CLOEXEC);
    for (int i = 0; i < nstreams; i++)
        open_stream(&streams[i]);
    uint64_t start = clock_ns(CLOCK_MONOTONIC), cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    run();
    report((double)(clock_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu) / (double)(clock_ns(CLOCK_MONOTONIC) - start));
    return (unanswered > 0 && !until_killed) || closed_early > 0;
}
