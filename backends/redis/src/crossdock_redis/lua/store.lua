-- Stores messages one after the other, each with its own outcome: where a queue has a limit, an id may be known, or a ghost stands.
--
-- KEYS[1]      prefix of the queue
-- ARGV[1]      token of the request, 12 characters
-- ARGV[2]      1: the queue may come into being; 2: and its limit does not hold
-- then         per message: id, value, due (0 now, > 0 an instant, < 0 so many milliseconds from now)
-- returns      {word, now, more, refused}: 'done' or 'unknown' (no such queue yet); now in ms; more: 1 where the next batch should
--              come this way, too; refused: flat list of index from 0 and reason: -1 the queue is full, else the generation held

local token = ARGV[1]
local memo = recall(token)
if memo then return {'done', now, 1, cmsgpack.unpack(memo)} end
if memo == false then return {'done', now, 1, {}} end
local queue = redis.call('HMGET', P .. 'q', 'named', 'max_ready')
if not queue[1] and ARGV[2] == '0' then return {'unknown', now, 0, {}} end

local most = queue[2] and ARGV[2] ~= '2' and tonumber(queue[2]) or math.huge
local ready = 0
if most < math.huge then
  catch_up(P)       -- a piece of it; the rest of what is due is counted where it is
  ready = ready_count(P) + redis.call('ZCOUNT', P .. 's', '-inf', now)
end
local refused = {}
local function refuse(index, reason)
  refused[#refused + 1] = index
  refused[#refused + 1] = reason
end
for i = 0, (#ARGV - 2) / 3 - 1 do
  local id, value, due = ARGV[3 + 3 * i], ARGV[4 + 3 * i], tonumber(ARGV[5 + 3 * i])
  local held = redis.call('HGET', P .. 'b', id)
  local is_ready = due >= 0 and due <= now
  if held then
    if generation_of(held) < generation_of(value) then refuse(i, generation_of(held)) end
  elseif is_ready and ready >= most then
    refuse(i, -1)
  else
    rename_ghost(P, id)
    store(P, id, value, due)
    if is_ready then ready = ready + 1 end
  end
end
if not queue[1] then redis.call('HSET', P .. 'q', 'named', 1) end
remember(token, cmsgpack.pack(refused))
local more = (queue[2] or redis.call('EXISTS', P .. 'gh') == 1) and 1 or 0
return {'done', now, more, refused}
